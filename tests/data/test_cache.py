"""The cache of arrays: private to the user, and ignored when it is damaged or someone else's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from uvim_fsq.data import cache
from uvim_fsq.data.cache import cache_dir, cached_arrays


def test_the_cache_is_private_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"a": np.array([len(made)])}

    def read() -> int:
        return int(cached_arrays("kind", {}, make)["a"][0])

    assert [read(), read()] == [1, 1] and folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    user = cache._user()
    monkeypatch.setattr(cache, "_user", lambda: user + 1)  # every file now belongs to another user
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert [read(), read()] == [2, 3]
    assert list(folder.iterdir()) == [file]


def test_a_file_of_another_user_in_the_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(path: Path) -> Callable[..., os.stat_result]:
        """Path.lstat and Path.stat, with `path` owned by another user."""
        real = Path.stat

        def stat(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            found = real(self, follow_symlinks=follow_symlinks)
            if self != path:
                return found
            values = list(found)
            values[4] += 1
            return os.stat_result(values)

        return stat

    folder = tmp_path / "cache"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    cached_arrays("kind", {}, lambda: {"a": np.array([1])})
    (file,) = folder.iterdir()
    monkeypatch.setattr(Path, "stat", foreign(file))
    assert cached_arrays("kind", {}, lambda: {"a": np.array([2])})["a"][0] == 2
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "~")
    monkeypatch.delenv("UVIM_FSQ_CACHE", raising=False)
    assert cache.cache_dir().name == f"uvim_fsq_{cache._user()}"


def test_cached_arrays_are_computed_once_and_again_when_damaged(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(len(made))
        return {"a": np.arange(3) + len(made), "b": np.array(["x", "üü"])}

    first = cached_arrays("kind", {"root": tmp_path, "n": 1}, make)
    again = cached_arrays("kind", {"n": 1, "root": tmp_path}, make)
    assert (
        len(made) == 1
        and again["b"].tolist() == ["x", "üü"]
        and again["a"].tolist() == first["a"].tolist() == [1, 2, 3]
    )
    cached_arrays("kind", {"root": tmp_path, "n": 2}, make)
    assert len(made) == 2
    (file, _) = sorted(own_cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = file.read_bytes()
    for broken in (b"", b"text", content[: len(content) // 2], content[:60] + b"\0" * 40 + content[100:]):
        file.write_bytes(broken)
        before = len(made)
        assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make)["a"][0] == before + 1
    assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make)["a"][0] == len(made)
    assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make, fresh=lambda old: False)["a"][0] == len(made)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(blocked))
    before = len(made)
    assert [cached_arrays("kind", {}, make)["a"][0] for _ in range(2)] == [before + 1, before + 2]


def test_a_full_disk_leaves_no_file_in_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert cached_arrays("kind", {}, lambda: {"a": np.ones(2)})["a"].tolist() == [1, 1]
    assert list(own_cache.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UVIM_FSQ_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("UVIM_FSQ_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "uvim_fsq"
