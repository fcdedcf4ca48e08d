"""Figures of another program: their file, and their column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from uvim_fsq.benchmark.peers import Peer, compared, read_peer, unmatched
from uvim_fsq.benchmark.start_up import STAGES
from uvim_fsq.benchmark.table import markdown
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.performance.timing import Measurement

ROW = {"value": 1.9, "unit": "ms"}


def written(folder: Path, tree: Any) -> Path:
    file = folder / "peer.json"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return file


def test_values_are_converted_to_the_units_of_measurements(tmp_path: Path) -> None:
    rows = {"a": {"value": 1.1, "unit": "s"}, "b": {"value": 0.22, "unit": "GB"}, "c": {"value": 7, "unit": "images/s"}}
    peer = read_peer(written(tmp_path, {"name": "JAX", "about": "one thread", "rows": rows}))
    assert (peer.name, peer.about) == ("JAX", "one thread")
    assert peer.rows == {"a": (1100.0, "ms"), "b": (220.0, "MB"), "c": (7.0, "images/s")}


def test_a_larger_ratio_is_better_for_rates_durations_and_memory() -> None:
    peer = Peer("JAX", "", {"rate": (10.0, "images/s"), "time": (2.0, "ms"), "memory": (50.0, "MB")})
    assert compared(peer, Measurement("rate", 20.0, "images/s")) == (10.0, 2.0)
    assert compared(peer, Measurement("time", 4.0, "ms")) == (2.0, 0.5)
    assert compared(peer, Measurement("memory", 100.0, "MB")) == (50.0, 0.5)
    assert compared(peer, Measurement("other", 1.0, "ms")) is None


def test_the_table_shows_them_beside_ours() -> None:
    peer = Peer("JAX", "", {"x": (1.9, "ms")})
    table = markdown([Measurement("x", 3.8, "ms"), Measurement("y", 1.0, "ms")], peer=peer).splitlines()
    assert table[0] == "|  | measured | spread | JAX | ours to JAX |"
    assert table[2:] == ["| x | 3.8 ms | 0% | 1.9 ms | 0.5 x |", "| y | 1 ms | 0% |  |  |"]


def test_rows_that_cannot_be_shown_are_named() -> None:
    peer = Peer("JAX", "", {"x": (1.9, "ms"), "y": (1.0, "MB"), "z": (1.0, "ms")})
    notes = unmatched(peer, [Measurement("x", 1.0, "ms"), Measurement("y", 1.0, "ms")], Path("f"))
    assert notes == [
        "note: f, row 'y': MB cannot be compared with ms",
        "note: 1 of 3 rows of f were not measured, e.g. 'z'",
    ]


BROKEN: dict[str, tuple[Any, str]] = {
    "empty": ("", "is not valid JSON"),
    "a list": ([], "must hold a JSON object with the keys name, about, rows"),
    "nested": ("[" * 100_000, "is not valid JSON"),
    "an unknown key": ({"name": "x", "rows": {"a": ROW}, "row": 1}, "unknown key 'row'; known keys: name, about, rows"),
    "no rows": ({"name": "x", "rows": {}}, "`rows` must hold at least one row"),
    "no name": ({"rows": {"a": ROW}}, "`name`, the title of the column, is missing"),
    "a name that breaks the table": ({"name": "a|b", "rows": {"a": ROW}}, "`name` must be one line"),
    "lines": ({"name": "x", "about": "a\nb", "rows": {"a": ROW}}, "`about` must be one line"),
    "a bare number": ({"name": "x", "rows": {"a": 1.9}}, "row 'a': must be an object such as"),
    "no unit": ({"name": "x", "rows": {"a": {"value": 1}}}, "row 'a': must be an object such as"),
    "another unit": ({"name": "x", "rows": {"a": {"value": 1, "unit": "h"}}}, "unit='h' must be one of images/s, ms"),
    "a unit that is a list": ({"name": "x", "rows": {"a": {"value": 1, "unit": []}}}, "unit=[] must be one of"),
    "text": ({"name": "x", "rows": {"a": {"value": "1", "unit": "ms"}}}, "value='1' must be a positive number"),
    "a boolean": ({"name": "x", "rows": {"a": {"value": True, "unit": "ms"}}}, "value=True must be a positive number"),
    "zero": ({"name": "x", "rows": {"a": {"value": 0, "unit": "ms"}}}, "value=0 must be a positive number"),
    "negative": ({"name": "x", "rows": {"a": {"value": -1, "unit": "ms"}}}, "value=-1 must be a positive number"),
    "nan": ('{"name": "x", "rows": {"a": {"value": NaN, "unit": "ms"}}}', "value=nan must be a positive number"),
    "infinite": ('{"name": "x", "rows": {"a": {"value": 1e999, "unit": "ms"}}}', "value=inf must be a positive number"),
    "huge": ({"name": "x", "rows": {"a": {"value": 10**400, "unit": "ms"}}}, "must be a positive number below 1e15"),
    "twice": ('{"name": "x", "rows": {"a": {"value": 1, "unit": "ms"}, "a": 2}}', "'a' is given twice"),
    "long": (" " * 1_000_001, "is longer than 1000000 bytes"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_one_clear_line(fault: str, tmp_path: Path) -> None:
    tree, message = BROKEN[fault]
    file = written(tmp_path, tree)
    with pytest.raises(UserError) as caught:
        read_peer(file)
    said = str(caught.value)
    assert message in said and said.startswith(str(file)) and len(said.splitlines()) == 1 and len(said) < 500


def test_a_missing_file_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "metrics", "--peer", str(tmp_path / "none.json")])
    said = capsys.readouterr()
    assert "none.json cannot be read: No such file or directory" in said.err and "measuring" not in said.out


@pytest.mark.parametrize("name", ["quickstart", "middle"])
def test_the_examples_name_rows_that_are_measured(name: str) -> None:
    """Those of decoding are compared in test_run.py, with what is measured."""
    peer = read_peer(ROOT / "examples" / "peers" / f"uvim_jax_{name}.json")
    assert "one thread" in peer.about and "medians of 9" in peer.about
    for row in peer.rows:
        assert row.removesuffix(", ahead of time") in (ROOT / "docs" / "performance.md").read_text(), row
        if row.startswith("start-up: "):
            assert row.removeprefix("start-up: ").removesuffix(", memory") in STAGES
