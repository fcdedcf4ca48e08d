"""File names in a data set's lists must stay inside the data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError

OUT = ["/etc/passwd", "../x.png", "a/../../x.png", "..", "a\\..\\x.png", "C:x.png", "c:/x.png", "", "a\0b"]


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_out_of_the_data_set_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which lies outside of the data set"):
        inner_name(name, tmp_path)


def test_a_name_inside_the_data_set_is_kept(tmp_path: Path) -> None:
    for name in ("a.png", "frankfurt/a_000.png", "..a.png", "a..b/c...png", "at 10:30.png", "ü/=1.png", 17):
        assert inner_name(name, tmp_path) == str(name)
