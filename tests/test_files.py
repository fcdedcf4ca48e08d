"""Files are written completely or not at all; a damaged file is one line with a remedy."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from uvim_fsq.data.encode import picture_bytes
from uvim_fsq.errors import UserError
from uvim_fsq.files import disk_is_full, read_json, write_json, write_whole, writing, writing_folder


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"
    write_json(file, {"rmse": 0.5})
    assert read_json(file, "") == {"rmse": 0.5}

    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="figures.json: the disk is full"):
        write_whole(file, half)
    assert read_json(file, "") == {"rmse": 0.5}
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("place", ["file/under.json", "/proc/nowhere/under.json"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="under.json: .*choose another path"):
        write_json(tmp_path / place, {})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1', b"[" * 100_000])
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "best.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="best.json is damaged .*; remove it") as caught:
        read_json(file, "remove it")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_recognized_in_numpy_and_torch() -> None:
    """NumPy raises an OSError without an error number, torch its own RuntimeError."""
    array = np.zeros(1 << 20, np.uint8)
    full = pytest.raises(UserError, match="cannot write a: the disk is full")
    with full, writing("a"), Path("/dev/full").open("wb") as file:
        np.save(file, array)
    with pytest.raises(UserError, match="cannot write b: the disk is full"), writing("b"):
        torch.save(torch.zeros(1 << 20), "/dev/full")
    with pytest.raises(UserError, match="cannot write c: the disk is full"), writing("c"):
        Path("/dev/full").write_bytes(picture_bytes(array.reshape(1024, 1024)))


def test_a_full_disk_is_recognized_by_its_many_messages() -> None:
    assert disk_is_full(OSError(errno.ENOSPC, "x")) and disk_is_full(OSError(errno.EDQUOT, "x"))
    assert disk_is_full(OSError("1000 requested and 512 written"))
    assert disk_is_full(OSError("Not enough free space to write 48000000 bytes"))
    assert disk_is_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        torch.empty(1 << 50)
    assert not disk_is_full(caught.value), caught.value
    assert not disk_is_full(OSError(errno.EACCES, "x")) and not disk_is_full(KeyError("No space left"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    with pytest.raises(KeyError), writing_folder(folder, "sign") as place:
        (place / "sign").write_text("1")
        assert not folder.exists()
        raise KeyError
    assert list(folder.parent.iterdir()) == []
    for text in ("1", "2"):
        with writing_folder(folder, "sign") as place:
            (place / "sign").write_text(text)
    assert (folder / "sign").read_text() == "2" and list(folder.parent.iterdir()) == [folder]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "photos", tmp_path / "link"
    folder.mkdir()
    (folder / "photo.jpg").write_text("mine")
    link.symlink_to(folder)
    for place in (folder, link, folder / "photo.jpg"):
        with pytest.raises(UserError, match="holds no sign, so it is not replaced"), writing_folder(place, "sign"):
            pass
    assert (folder / "photo.jpg").read_text() == "mine"
