"""Optional packages, and timings relative to ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.benchmark import without
from uvim_fsq.benchmark import compare
from uvim_fsq.performance.timing import Timing


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *compare.PACKAGES)
    module, said = compare.find_package("transformers")
    assert module is None and said == "not installed: pip install 'uvim-fsq[benchmark]'"
    module, said = compare.find_package("panopticapi", "evaluation")
    assert module is None
    assert said == "not installed: pip install git+https://github.com/cocodataset/panopticapi.git"


def test_a_package_that_cannot_be_imported_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vector_quantize_pytorch.py").write_text("import a_package_that_nobody_has")
    (tmp_path / "panopticapi.py").write_text("raise ImportError('made for another Python\\nmore')")
    (tmp_path / "transformers.py").write_text("five = 5")
    for name in compare.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    module, said = compare.find_package("vector_quantize_pytorch")
    assert module is None and said.startswith("cannot be imported (No module named 'a_package_that_nobody_has'): pip")
    module, said = compare.find_package("panopticapi")
    assert module is None and said.startswith("cannot be imported (made for another Python): pip install git+")
    assert compare.find_package("transformers")[0].five == 5
    for name in compare.PACKAGES:
        sys.modules.pop(name, None)


def test_a_comparison_gives_times_relative_to_ours() -> None:
    timings = {"ours": Timing((2.0, 2.0)), "theirs": Timing((3.0, 5.0))}
    ours, theirs = compare.compare("work", timings, ours="ours", count=4, unit="images/s", version="1.2")
    assert (ours.name, ours.value, ours.unit, ours.other) == ("work, ours", 2.0, "images/s", {"version": "1.2"})
    assert (theirs.name, theirs.value, theirs.other) == ("work, theirs", 1.0, {"time / ours": 2.0})
    assert theirs.spread == 0.5
    ours, theirs = compare.compare("work", timings, ours="ours", count=4)
    assert (ours.value, theirs.value, theirs.unit, theirs.other["time / ours"]) == (500.0, 1000.0, "ms", 2.0)
