"""How inputs are found and listed."""

from __future__ import annotations

import codecs
from pathlib import Path

from uvim_fsq.data.folders import and_list, expand_lists, list_images


def test_names_are_listed_in_a_sentence() -> None:
    assert [and_list("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert and_list("abcdef") == "a, b, c, d, e and f" and and_list("abcdefgh") == "a, b, c, d, e, f and 2 more"


def test_numbers_in_names_are_sorted_by_value(tmp_path: Path) -> None:
    names = ["2/a.png", "10/a.png", "frame2.png", "frame10.png", "frame010b.png", "frame٣.png"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in list_images([str(tmp_path)])] == names


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + b"a.png\r\nb.png\r\n")
    assert expand_lists([f"@{tmp_path}/list.txt"]) == ["a.png", "b.png"]
