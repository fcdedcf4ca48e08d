"""How messages list folders and files."""

from __future__ import annotations

from uvim_fsq.data.folders import and_list


def test_names_are_listed_in_a_sentence() -> None:
    assert [and_list("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert and_list("abcdef") == "a, b, c, d, e and f" and and_list("abcdefgh") == "a, b, c, d, e, f and 2 more"
