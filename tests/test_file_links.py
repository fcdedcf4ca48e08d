"""Links: writing replaces them, and links that lead out of a run are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from uvim_fsq import files
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, refuse_links


def test_writing_replaces_a_link(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "run" / "a.json"
    precious.write_text("mine")
    file.parent.mkdir()
    file.symlink_to(precious)
    (file.parent / f".a.json.{os.getpid()}.partial").symlink_to(precious)
    files.write_json(file, {"a": 1})
    assert precious.read_text() == "mine" and json.loads(file.read_text()) == {"a": 1} and not file.is_symlink()
    # A device is not written through a link, but paths in /dev are.
    file.unlink()
    file.symlink_to("/dev/full")
    files.write_text(file, "x")
    assert file.read_text() == "x" and not file.is_symlink()
    end, start = os.pipe()
    files.write_text(Path(f"/dev/fd/{start}"), "through the pipe")
    assert os.read(end, 99) == b"through the pipe"


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "run_2"
    (run / "a").mkdir(parents=True)
    other.mkdir()
    (run / "inner").symlink_to(run / "a")
    (tmp_path / "alias").symlink_to(run)
    for file in (run / "x", run / "a/x", run / "inner/x", run / "new/x"):
        assert inside(run, file) == file
    assert inside(tmp_path / "alias", run / "x")
    refuse_links(run)
    refuse_links(tmp_path / "nowhere")
    (run / "a" / "out").symlink_to(other)
    with pytest.raises(UserError, match="a/out is a link that leads out of .*run, to .*run_2; replace it with a copy"):
        refuse_links(run)
    with pytest.raises(UserError, match="leads out of"):
        inside(run, run / "a/out/x")
    (run / "a" / "out").unlink()
    (run / "dead").symlink_to(tmp_path / "not" / "there")
    with pytest.raises(UserError, match="dead is a link"):
        refuse_links(run)
