"""The benchmark's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uvim_fsq.benchmark.table import markdown, read_earlier
from uvim_fsq.errors import UserError
from uvim_fsq.performance.timing import Measurement, Timing, milliseconds, rate


def test_lines_show_value_roofline_and_fraction_reached() -> None:
    timing = Timing((1.0, 2.0, 4.0))
    line = rate("x", timing, 10, roofline=20.0)
    assert line.value == 5 and line.ratio == 0.25 and line.spread == 1.5
    assert milliseconds("y", timing, 4, roofline=250.0).value == 500
    assert milliseconds("y", timing, 4, roofline=250.0).ratio == 0.5
    earlier = {"by_name": {"x": {"value": 2.5, "unit": "images/s"}, "y": {"value": 1000.0, "unit": "ms"}}}
    table = markdown([line, milliseconds("y", timing, 4), Measurement("z", 1.0, "ms")], earlier).splitlines()
    assert table[0] == "|  | measured | roofline | reached | spread | earlier | speed-up |"
    assert table[2] == "| x | 5 images/s | 20 images/s | 25% | 150% | 2.5 images/s | 2.00 x |"
    assert table[3].endswith("| 1000 ms | 2.00 x |") and table[4].endswith("|  |  |")


LINE = {"name": "x", "value": 2.5, "unit": "ms"}


@pytest.mark.parametrize(
    "lines",
    [
        [{"name": "x"}],
        [LINE | {"value": 0}],
        [LINE | {"value": "1"}],
        [LINE | {"value": float("nan")}],
        [LINE | {"unit": 3}],
        [LINE | {"name": []}],
        [3],
    ],
)
def test_an_earlier_result_with_broken_lines_is_refused_before_anything_is_measured(tmp_path: Path, lines: Any) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"device_peak": {"device": "a CPU"}, "measurements": [LINE]}))
    assert read_earlier(file)["by_name"] == {"x": LINE}
    file.write_text(json.dumps({"device_peak": {"device": "a CPU"}, "measurements": lines}))
    with pytest.raises(UserError, match="is not a result of"):
        read_earlier(file)


def test_a_deeply_nested_earlier_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a result of"):
        read_earlier(file)


def test_other_figures_of_any_kind_are_printed() -> None:
    line = Measurement("x", 1.0, "ms", other={"share": 0.12345, "levels": [8, 8], "note": "not installed"})
    assert "share 0.123; levels [8, 8]; note not installed |" in markdown([line])
