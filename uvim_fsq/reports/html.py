"""Self-contained HTML pages with tables and embedded images."""

from __future__ import annotations

import base64
import html
import io
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
    """An HTML table whose first row is the header."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f"<table><tr>{cells(rows[0], 'th')}</tr>{body}</table>"


STYLE = """body{font-family:system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .9em;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;display:block;margin:1em 0}code{background:#f3f3f3}"""


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Writes a self-contained page. `sections` are pairs of heading and HTML."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
    write_text(path, page)
