"""The sections of an evaluation's report that show more than the metrics."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uvim_fsq.data.sample import Array
from uvim_fsq.evaluation.examination import Examined
from uvim_fsq.reports.figures import count_figure, level_figure
from uvim_fsq.reports.html import chart_tag, html_table, picture_tag
from uvim_fsq.reports.panels import Panel
from uvim_fsq.reports.token_figures import (
    breakdown_figure,
    code_places_figure,
    codebook_figure,
    perplexity,
    place_figure,
    reliability_figure,
    values_figure,
)
from uvim_fsq.tasks.base import Matrix, Task

#: Heading and HTML.
Section = tuple[str, str]
#: What the predictions are called in headings, tables and legends.
SHORT = {"baseline": "baseline", "context_only": "context alone", "lm": "LM", "direct": "direct", "oracle": "oracle"}
#: Predictions by how much a reader wants to see them.
IMPORTANT = ("lm", "direct", "oracle")
#: Largest width of a picture in pixels; the least is half of it, because small ones are enlarged by whole numbers.
WIDEST_PICTURE = 240
#: Width in pixels that small pictures are enlarged to, at most.
ENLARGED = 192
#: How many of the best, the median and the worst images are shown.
EXTREMES = 2


def charts(found: Sequence[tuple[str, str]]) -> str:
    """HTML of titled charts or tables that stand next to each other where there is room."""
    items = "".join(f"<div><h3>{html.escape(title)}</h3>{chart}</div>" for title, chart in found)
    return f'<div class="charts">{items}</div>'


def panel_html(heading: str, row: Mapping[str, Panel]) -> str:
    """HTML of the pictures of one image, each with its title and caption."""
    figures = ""
    for title, panel in row.items():
        width = ENLARGED if panel.picture.shape[1] <= ENLARGED else WIDEST_PICTURE
        figures += (
            f"<figure>{picture_tag(panel.picture, title, width)}"
            f"<figcaption><b>{html.escape(title)}</b>{html.escape(panel.caption)}</figcaption></figure>"
        )
    return f'<h3>{html.escape(heading)}</h3><div class="panels">{figures}</div>'


def ranked_way(examined: Mapping[str, Examined]) -> str | None:
    """The prediction by which images are ranked; None if no image has a figure of its own."""
    return next((name for name in IMPORTANT if name in examined and examined[name].values), None)


def extremes(
    values: Sequence[tuple[str, int, float]], *, smaller_is_better: bool, count: int = EXTREMES
) -> list[tuple[str, int, float]]:
    """(heading, index in the split, value) of the best, median and worst images, each image once.

    Args:
        values: `Examined.values`.
        smaller_is_better: of two values.
        count: how many of each kind.
    """
    order = sorted(values, key=lambda item: item[2] if smaller_is_better else -item[2])
    middle = max(0, (len(order) - count) // 2)
    kinds = {
        "best": range(count),
        "median": range(middle, middle + count),
        "worst": range(len(order) - 1, len(order) - 1 - count, -1),
    }
    found: dict[int, tuple[str, int, float]] = {}
    for kind, places in kinds.items():
        for place in places:
            if 0 <= place < len(order) and place not in found:
                _, index, value = order[place]
                found[place] = (kind, index, value)
    return list(found.values())


def distribution_section(task: Task, examined: Mapping[str, Examined]) -> Section:
    """Histograms of the main metric of single images, and its quantiles."""
    found = {SHORT.get(name, name): [value for _, _, value in x.values] for name, x in examined.items() if x.values}
    if not found:
        return "Single images", f"<p>{html.escape(str(task.main_metric))} is not defined for a single image.</p>"
    rows = [["", "images", "smallest", "10%", "median", "90%", "largest"]]
    for name, values in found.items():
        quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1])
        rows.append([name, str(len(values)), *(f"{value:.3f}" for value in quantiles)])
    chart = chart_tag(values_figure(found, task.main_metric), "distribution over images")
    return "Single images", html_table(rows) + chart


def class_section(figures: Mapping[str, Mapping[str, float]]) -> Section:
    """A table of the figures of each class, which are named METRIC/CLASS."""
    names: dict[tuple[str, str], None] = {}
    for found in figures.values():
        for key in found:
            metric, slash, name = key.partition("/")
            if slash and metric != "official":
                names[metric, name] = None
    if not names:
        return "Classes", "<p>The task has no figures of single classes.</p>"
    content = ""
    for metric in dict.fromkeys(metric for metric, _ in names):
        keys = [(name, f"{metric}/{name}") for other, name in names if other == metric]
        ways = [way for way, found in figures.items() if any(key in found for _, key in keys)]
        # A class that occurs in no truth and in no prediction has no figure.
        columns = {SHORT.get(way, way): [figures[way].get(key) for _, key in keys] for way in ways}
        content += html_table(_table(metric, [name for name, _ in keys], columns))
    return "Classes", content


def _texts(values: Sequence[float | None]) -> list[str]:
    """Numbers of a column with the same number of digits; empty where there is none."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    digits = 0 if all(float(value).is_integer() for value in known) else 3 if max(map(abs, known)) < 10 else 2
    return ["" if value is None or not np.isfinite(value) else f"{value:.{digits}f}" for value in values]


def _table(corner: str, names: Sequence[str], columns: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    """Rows of a table, header first: a name and a number of each column."""
    texts = [_texts(values) for values in columns.values()]
    return [[corner, *columns], *([name, *line] for name, *line in zip(names, *texts, strict=True))]


def breakdown_sections(examined: Mapping[str, Examined]) -> list[Section]:
    """A chart and tables of each table of the task's breakdown."""
    titles = dict.fromkeys(title for found in examined.values() for title in found.tables)
    sections: list[Section] = []
    for title in titles:
        found = {SHORT.get(name, name): x.tables[title] for name, x in examined.items() if title in x.tables}
        tables = [(name, html_table(_matrix_rows(matrix))) for name, matrix in found.items()]
        sections.append((title, chart_tag(breakdown_figure(found), title) + charts(tables)))
    return sections or [("Breakdown", "<p>The task divides its images no further.</p>")]


def _matrix_rows(matrix: Matrix) -> list[list[str]]:
    return _table("", matrix.rows, dict(zip(matrix.columns, matrix.values.T.tolist(), strict=True)))


def calibration_section(examined: Examined) -> Section:
    """How confidence and correctness of the LM's tokens agree."""
    found = examined.calibration
    if found is None or not found.tokens.sum():
        return "Confidence of the LM", "<p>Not known: compiled decoding does not return probabilities.</p>"
    total = found.tokens.sum()
    rows = [
        ["expected calibration error", "mean confidence", "right tokens", "tokens"],
        [
            f"{found.error:.3f}",
            f"{found.confidence.sum() / total:.3f}",
            f"{found.right.sum() / total:.3f}",
            f"{total:.0f}",
        ],
    ]
    text = (
        "<p>A token is right if it is the one that the oracle makes of the true labels. Its confidence is the "
        "probability that the LM gave it when it was chosen. The dots are the mean confidence of the tokens in a "
        "range; below the diagonal the LM is too sure. A wrong token can still be decoded to nearly the right "
        "labels.</p>"
    )
    return "Confidence of the LM", text + html_table(rows) + chart_tag(reliability_figure(found), "reliability")


def token_section(result: Mapping[str, Any], examined: Mapping[str, Examined]) -> Section | None:
    """How often each code is used, and where; None without codes."""
    if not result["code_counts"]:
        return None
    content = ""
    for name, counts in result["code_counts"].items():
        used = sum(count > 0 for count in counts)
        found = [
            ("codes by frequency", chart_tag(count_figure(counts), f"{name} usage")),
            ("log10 of each code's count, by index", chart_tag(codebook_figure(np.array(counts)), f"{name} codebook")),
        ]
        levels = result["level_histogram"].get(name)
        if levels:
            found.append(("levels of the channels", chart_tag(level_figure(levels), f"{name} levels")))
        if name in examined:
            found += _place_charts(name, examined[name].positions, examined[name].right)
        content += f"<h3>{html.escape(SHORT[name])}: {used} of {len(counts)} codes used</h3>{charts(found)}"
    return "Tokens", "<p>Maps of places have one cell per token, row by row.</p>" + content


def _place_charts(name: str, positions: Array | None, right: Array | None) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if positions is not None:
        tag = chart_tag(place_figure(perplexity(positions), low=1), f"{name} perplexity")
        found.append(("codes in use at each place (perplexity)", tag))
        found.append(("where the most frequent codes are", chart_tag(code_places_figure(positions), f"{name} places")))
    if right is not None:
        tag = chart_tag(place_figure(right, 0), f"{name} right tokens")
        found.append(("share of right tokens at each place", tag))
    return found


def decoding_section(task: Task, result: Mapping[str, Any]) -> Section:
    """The figures with other decoding settings, if they were asked for."""
    title = "Decoding"
    if "decodings" not in result:
        return title, "<p>Not measured; evaluate with <code>--decodings</code> to compare settings.</p>"
    metrics = [task.main_metric, *task.secondary_metrics]
    found = result["decodings"]
    columns = [_texts([item["figures"].get(name) for item in found]) for name in metrics]
    rows = [["", *metrics]]
    for item, *figures in zip(found, *columns, strict=True):
        changed = ", ".join(f"{key} {value}" for key, value in item["settings"].items())
        rows.append([changed or "as evaluated", *figures])
    text = (
        "<p>All other settings as evaluated. Hard codes and single samples commit to one answer, which a figure per "
        "pixel punishes and a picture may gain from. These are the reported images: do not choose settings by this "
        "table, but with <code>uvim-fsq tune</code>, which uses others.</p>"
    )
    return title, text + html_table(rows)
