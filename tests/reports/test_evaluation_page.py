"""The HTML page of an evaluation."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch

from tests.support.cli import failure
from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.examination import Examined
from uvim_fsq.evaluation.run import evaluate, evaluate_loaded
from uvim_fsq.reports import evaluation_page
from uvim_fsq.reports.evaluation_page import result_table
from uvim_fsq.reports.evaluation_sections import calibration_section, class_section, decoding_section, extremes
from uvim_fsq.reports.figures import count_figure, matrix_figure
from uvim_fsq.reports.html import chart_tag, html_table, picture_tag
from uvim_fsq.reports.token_figures import breakdown_figure, perplexity, square
from uvim_fsq.tasks.base import Matrix

EVIL = "<script>alert(1)</script>&$x_{$"


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_the_page_shows_the_curves_of_both_stages(
    random_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    oracle, lm = random_runs
    run, folders = (oracle, {"oracle": oracle}) if stage == "oracle" else (lm, {"oracle": oracle, "lm": lm})
    written: list[Any] = []
    monkeypatch.setattr(evaluation_page, "write_evaluation_page", lambda *arguments: written.append(arguments))
    result = evaluate(run, limit=1)
    evaluation_page.write_run_page(tmp_path / "page.html", run, ["eval.limit=1"], result)
    ((page, title, loaded, shown, where, device, compared, examined),) = written
    assert (page, title, shown) == (tmp_path / "page.html", "nyu_depth: nyu_depth/full", result)
    assert device == torch.device("cpu") and where == folders and loaded.run.eval.limit == 1
    assert compared is None and examined is None


def test_the_page_of_a_comparison_shows_the_direct_curve_too(
    random_runs: tuple[Path, Path], direct_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(evaluation_page, "write_evaluation_page", lambda *arguments: written.append(arguments))
    evaluation_page.write_run_page(
        tmp_path / "page.html", random_runs[1], ["eval.limit=1"], {"protocol": ""}, direct_dir
    )
    *_, where, _, compared, _ = written[0]
    assert where == {"oracle": random_runs[0], "lm": random_runs[1], "direct": direct_dir}
    assert compared.checkpoint.parent.parent == direct_dir and compared.run.eval.limit == 1


@pytest.mark.slow
def test_evaluate_writes_a_page_only_if_asked(random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["evaluate", str(random_runs[0]), "--limit", "4", "--json", str(tmp_path / "result.json")]
    main(command)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    main([*command, "--report", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "nyu_depth/full" in page and "4 images, the first 4 only" in page
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint_sha256"][:16] in page


class Tags(html.parser.HTMLParser):
    """The tags, texts and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_a_page_has_all_sections_and_needs_no_other_file(random_lm: LoadedRun, tmp_path: Path) -> None:
    examined: dict[str, Examined] = {}
    result = evaluate_loaded(random_lm, limit=4, device=torch.device("cpu"), examined=examined, decodings=True)
    file = tmp_path / "page.html"
    evaluation_page.write_evaluation_page(file, EVIL, random_lm, result, {}, torch.device("cpu"), examined=examined)
    page = file.read_text()
    found = Tags(page)
    for heading in ("Best, median and worst", "Single images", "Classes", "Error by depth", "Confidence", "Tokens"):
        assert heading in found.text
    assert "expected calibration error" in found.text and "as evaluated" in found.text
    assert re.search(r"\d m; colors 0 to \d", found.text)
    assert "script" not in found.tags and EVIL in found.text
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in found.addresses)
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page and "@media print" in page
    # Ids of the charts are unique, so that one chart cannot take another's marks.
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_each_image_is_shown_once_as_best_median_or_worst() -> None:
    values = [(f"{i}", 10 + i, float(i)) for i in range(9)]
    assert extremes(values, smaller_is_better=True) == [
        *(("best", 10, 0.0), ("best", 11, 1.0)),
        *(("median", 13, 3.0), ("median", 14, 4.0)),
        *(("worst", 18, 8.0), ("worst", 17, 7.0)),
    ]
    assert [index for _, index, _ in extremes(values, smaller_is_better=False, count=1)] == [18, 14, 10]
    assert extremes(values[:3], smaller_is_better=True) == [("best", 10, 0.0), ("best", 11, 1.0), ("worst", 12, 2.0)]
    assert extremes([], smaller_is_better=True) == []


def test_small_pictures_are_enlarged_by_whole_numbers() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    assert 'class="sharp" width="192" height="144"' in picture_tag(picture, "a", 200)
    assert 'width="32"' in picture_tag(picture, "a", 63) and "sharp" not in picture_tag(picture, "a", 63)
    assert 'width="16" height="12"' in picture_tag(picture, "a", 16)


def test_charts_have_the_colors_of_the_page_and_harmless_texts() -> None:
    matrix = Matrix([EVIL, "b"], [EVIL], np.array([[1.0], [np.nan]]))
    tag = chart_tag(breakdown_figure({EVIL: matrix}), EVIL)
    assert "currentColor" in tag and "#000000" not in tag and "<script" not in tag
    assert (
        EVIL in Tags(tag).text and "0.0" in Tags(tag).text and tag == chart_tag(breakdown_figure({EVIL: matrix}), EVIL)
    )


def test_large_matrices_scroll_by_themselves() -> None:
    def tag(count: int) -> str:
        names = [str(i) for i in range(count)]
        return chart_tag(matrix_figure({"rows": names, "columns": names, "values": np.eye(count).tolist()}), "m")

    assert 'class="chart wide"' in tag(20) and 'class="chart"' in tag(3)
    assert html_table([["a"]]).startswith('<div class="scroll">')


def test_classes_with_slashes_and_absent_classes_have_a_row() -> None:
    figures = {"lm": {"pq": 1.0, "pq/a/b": 2.0, "official/pq": 3.0}, "oracle": {"pq/" + EVIL: 12.5}}
    _, content = class_section(figures)
    assert "<td>a/b</td><td>2</td><td></td>" in content and "official" not in content and "<script" not in content
    assert "no figures of single classes" in class_section({"lm": {"rmse": 1.0}})[1]


def test_what_was_not_measured_is_said(random_lm: LoadedRun) -> None:
    assert "--decodings" in decoding_section(random_lm.task, {})[1]
    assert "compiled" in calibration_section(Examined())[1]


def test_places_with_one_code_have_perplexity_one() -> None:
    assert perplexity(np.array([[4, 0], [2, 2], [0, 0]])).tolist() == pytest.approx([1, 2, 1])
    assert np.isnan(square(np.ones(5))).sum() == 4 and square(np.ones(4)).shape == (2, 2)


def test_decodings_of_an_oracle_are_refused(
    random_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no LM" in failure(capsys, "evaluate", random_runs[0], "--decodings", "--json", tmp_path / "result.json")


def test_missing_figures_and_a_perfect_baseline_have_empty_cells(random_lm: LoadedRun) -> None:
    figures = {"baseline": {"rmse": 0.0}, "lm": {"rmse": 0.5, "abs_rel": 0.25, "delta1": 1.0}}
    rows = result_table(random_lm.task, {"figures": figures, "baseline": "none"})
    assert [row[1:] for row in rows] == [
        ["rmse", "abs_rel", "delta1", "codebook usage"],
        ["0.000", "", "", ""],
        ["0.500", "0.250", "1.000", ""],
    ]


def test_names_that_the_charts_font_lacks_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    matrix = {"rows": ["道"], "columns": ["路"], "values": [[1]]}
    assert "道" in chart_tag(matrix_figure(matrix), "m") and not recwarn.list


def test_charts_of_large_codebooks_stay_small() -> None:
    counts = list(range(20_000))
    assert len(chart_tag(count_figure(counts), "c")) < 100_000
    (patch,) = count_figure([3, 1, 2]).axes[0].patches
    assert isinstance(patch, StepPatch) and patch.get_data()[0].tolist() == [3, 2, 1]


def test_a_page_that_cannot_be_written_costs_no_result(
    random_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("uvim_fsq.evaluation.run.evaluate", lambda *_, **__: {"overrides": {}})
    monkeypatch.setattr(evaluation_page, "write_run_page", fail)
    file = tmp_path / "result.json"
    arguments = ("evaluate", random_runs[0], "--report", tmp_path / "page.html", "--json", file)
    assert "the disk is full" in failure(capsys, *arguments)
    assert json.loads(file.read_text()) == {"overrides": {}}
