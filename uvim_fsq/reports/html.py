"""Self-contained HTML pages with tables and embedded images."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from uvim_fsq.files import write_text

# Imported only when something is drawn, because it takes half a second.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_tag(picture: np.ndarray | Figure, alt: str) -> str:
    """An <img> tag with the image embedded as base64, so that the page needs no other files."""
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    else:
        picture.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table whose first row is the header. A table wider than the page scrolls by itself."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{cells(rows[0], "th")}</tr>{body}</table></div>'


def picture_tag(picture: np.ndarray, alt: str, width: int) -> str:
    """An <img> tag of a picture (H, W, 3) uint8, `width` pixels wide or, on a narrow screen, narrower.

    A smaller picture is enlarged by a whole number without smoothing, so that each pixel is a sharp square: already in
    the file, because viewers of printed pages smooth what they enlarge.
    """
    factor = width // picture.shape[1]
    if factor > 1:
        picture = picture.repeat(factor, 0).repeat(factor, 1)
    elif picture.shape[1] > width:
        height = max(1, round(picture.shape[0] * width / picture.shape[1]))
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
    sharp = ' class="sharp"' if factor > 1 else ""
    size = f'width="{picture.shape[1]}" height="{picture.shape[0]}"'
    return png_tag(picture, alt).replace("<img", f"<img{sharp} {size}", 1)


def chart_tag(figure: Figure, alt: str) -> str:
    """A figure as SVG without a background, whose black lines and texts have the color of the page's text.

    It fits light and dark pages, screens and paper. It is never wider than the page, unless it is too large to be read
    then: such a figure scrolls by itself.
    """
    import matplotlib

    buffer = io.StringIO()
    # Text stays text. The salt keeps the ids in the file, and so the page, the same in each run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            # The browser has fonts for the scripts that matplotlib's lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    # Inside of HTML, SVG needs neither namespaces nor their prefix.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2).replace("xlink:href", "href")
    svg = re.sub(r"(stroke|fill): #000000", r"\1: currentColor", svg)
    svg = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", svg)
    # matplotlib numbers its groups from 1 in every figure; nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    kind = "chart wide" if figure.get_figwidth() > WIDEST else "chart"
    return f'<div class="{kind}" role="img" aria-label="{html.escape(alt)}">{svg}</div>'


#: Width in inches above which a figure cannot be read on a telephone.
WIDEST = 6
STYLE = """:root{color-scheme:light dark;--text:#222;--page:#fff;--line:#ccc;--code:#f3f3f3}
@media (prefers-color-scheme:dark){:root{--text:#ddd;--page:#181818;--line:#555;--code:#2b2b2b}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{font-family:system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em;color:var(--text);
background:var(--page);line-height:1.4}
h1,h2,h3,p,li,figcaption{overflow-wrap:anywhere}p,ul{max-width:55em}
.scroll,.wide{overflow-x:auto;margin:.5em 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.3em .9em;border-bottom:1px solid var(--line);text-align:right}td:first-child,th:first-child
{text-align:left}td:first-child{min-width:7em}
img{max-width:100%;display:block;margin:1em 0}code{background:var(--code);overflow-wrap:anywhere}
.charts{display:flex;flex-wrap:wrap;gap:.5em 2em}.charts>div{min-width:0;max-width:100%}
.charts td,.charts th{padding:.2em .5em}.chart svg{max-width:100%;height:auto;display:block}
.wide svg{max-width:none}.chart text{fill:currentColor}
.panels{display:flex;flex-wrap:wrap;gap:.6em;margin:.3em 0 1.5em}.panels figure{margin:0;max-width:calc(50% - .3em)}
.panels img{margin:0;height:auto}.sharp{image-rendering:pixelated}
figcaption{font-size:.8em;width:0;min-width:100%}figcaption b{display:block}
@media print{:root{color-scheme:light;--text:#000;--page:#fff;--line:#999;--code:#f3f3f3}body{margin:0;max-width:none;
font-size:10pt}.panels{gap:.4em}.panels figure{max-width:15.8%}.scroll,.wide{overflow:visible}table{font-size:8pt}
.wide svg{max-width:100%}h2,h3{break-after:avoid}.panels figure,.chart,tr,img{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"""


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Writes a self-contained page. `sections` are pairs of heading and HTML.

    What is not text, such as the name of a file in another encoding than UTF-8, becomes question marks.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
    write_text(path, page.encode(errors="replace").decode())
