"""The benchmark's table."""

from __future__ import annotations

from uvim_fsq.benchmark.table import markdown
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


def test_other_figures_of_any_kind_are_printed() -> None:
    line = Measurement("x", 1.0, "ms", other={"share": 0.12345, "levels": [8, 8], "note": "not installed"})
    assert "share 0.123; levels [8, 8]; note not installed |" in markdown([line])
