"""Decoded files kept on disk equal what was decoded, follow changes of their files, and never make loading fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.damage import blank_images
from tests.support.small import ORACLE, oracle_run, small_data
from uvim_fsq.checkpoints.loading import build_task, resolve
from uvim_fsq.config.schema import Run
from uvim_fsq.data.decoded import HEADER, decoded, keep_decoded
from uvim_fsq.data.images import read_image
from uvim_fsq.data.loader import TrainLoader, eval_batches
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.configuration import load_run

RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8),
    np.array([[0.0, 1.25], [np.float32(np.inf), -3e-9]], np.float32),
    *(RNG.integers(low, high, (4, 3)).astype(np.int32) for low, high in ((0, 200), (-9, 9), (0, 9000), (-9, 1 << 30))),
    np.zeros((0, 4), np.int32),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"one")
    return tmp_path / "file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


class Decoder:
    """Counts how often it decodes."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.times = array, 0

    def __call__(self) -> np.ndarray:
        self.times += 1
        return self.array


def kept_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_a_file_is_decoded_once(file: Path, folder: Path, array: np.ndarray) -> None:
    decode = Decoder(array)
    with keep_decoded(str(folder)):
        for _ in range(3):
            again = decoded(file, array.dtype.type, None, decode)
            np.testing.assert_array_equal(again, array)
            assert again.dtype == array.dtype and again.shape == array.shape and again.flags.writeable
    assert decode.times == 1


def test_small_integers_are_stored_in_one_byte(file: Path, folder: Path) -> None:
    with keep_decoded(str(folder)):
        decoded(file, np.int32, None, lambda: np.full((100, 100), 200, np.int32))
    (kept,) = kept_files(folder)
    assert kept.stat().st_size == HEADER + 10_000


def test_nothing_is_kept_outside_of_the_block(file: Path, folder: Path) -> None:
    decode = Decoder(ARRAYS[0])
    with keep_decoded(""):
        decoded(file, np.uint8, None, decode)
    with keep_decoded(str(folder)):
        pass
    decoded(file, np.uint8, None, decode)
    assert decode.times == 2 and not folder.exists()


def change_content(file: Path) -> None:
    file.write_bytes(b"longer")


def change_time(file: Path) -> None:
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [change_content, change_time])
def test_a_changed_file_is_decoded_again(file: Path, folder: Path, change: Callable[[Path], None]) -> None:
    decode = Decoder(ARRAYS[0])
    with keep_decoded(str(folder)):
        decoded(file, np.uint8, None, decode)
        change(file)
        decoded(file, np.uint8, None, decode)
    assert decode.times == 2


def test_another_way_of_decoding_is_another_array(file: Path, folder: Path) -> None:
    with keep_decoded(str(folder)):
        for scale in (1, 2, 1, 2):
            array = np.full((2, 2), scale, np.float32)
            assert decoded(file, np.float32, ["depth", scale], lambda array=array: array)[0, 0] == scale


@pytest.mark.parametrize(
    "damage", [b"", b"|u1 5 7", b"<f4 5 7 3".ljust(64) + bytes(9), b"zero".ljust(64), b"\xff" * 99]
)
def test_a_damaged_array_is_decoded_again_and_replaced(file: Path, folder: Path, damage: bytes) -> None:
    decode = Decoder(ARRAYS[0])
    with keep_decoded(str(folder)):
        decoded(file, np.uint8, None, decode)
        (kept,) = kept_files(folder)
        whole = kept.read_bytes()
        kept.write_bytes(damage)
        np.testing.assert_array_equal(decoded(file, np.uint8, None, decode), ARRAYS[0])
    assert decode.times == 2 and kept.read_bytes() == whole


def test_a_missing_file_is_an_error_even_if_it_was_kept(tmp_path: Path, folder: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(ARRAYS[0]).save(picture)
    with keep_decoded(str(folder)):
        read_image(picture)
        picture.unlink()
        with pytest.raises(UserError, match="a.png: no such image file"):
            read_image(picture)


def test_a_damaged_image_is_an_error_and_not_kept(tmp_path: Path, folder: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(ARRAYS[0]).save(picture)
    picture.write_bytes(picture.read_bytes()[:-30])
    with keep_decoded(str(folder)), pytest.raises(UserError, match="a.png cannot be read as an image"):
        read_image(picture)
    assert not folder.exists()


def test_too_little_free_space_is_a_warning(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with keep_decoded(str(folder)), pytest.warns(UserWarning, match=r"data.cache_dir=.*kept: less than 5 GB are free"):
        np.testing.assert_array_equal(decoded(file, np.uint8, None, Decoder(ARRAYS[0])), ARRAYS[0])
    assert not kept_files(folder)


def test_a_folder_that_cannot_be_written_is_a_warning(file: Path) -> None:
    with keep_decoded(str(file)), pytest.warns(UserWarning, match=r"data.cache_dir=.*file: Not a directory"):
        np.testing.assert_array_equal(decoded(file, np.uint8, None, Decoder(ARRAYS[0])), ARRAYS[0])


TASKS = {
    "nyu_depth": "nyu",
    "coco_panoptic": "coco_panoptic",
    "imagenet_color": "imagenet",
    "semantic_segmentation": "semantic",
}


@pytest.fixture(params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A small configuration of each task, with data whose files are decoded."""
    write_dataset(TASKS[request.param], tmp_path / "data", 8, (24, 32), num_val=2, layout="png", workers=1)
    task = {"name": request.param} | ({"protocol": "full"} if request.param == "nyu_depth" else {})
    return resolve(load_run(ORACLE | {"task": task}, ["train.out=x", f"data.root={tmp_path / 'data'}"]))


def batches(run: Run, cache_dir: Path | str) -> list[Batch]:
    """Two epochs of training batches."""
    task = build_task(run)
    config = replace(run.data, cache_dir=str(cache_dir))
    loader = TrainLoader(task.source(run.data.root, "train"), task, config, batch_size=4, seed=0)
    return list(loader.batches(0, 4))


def same(one: Batch, two: Batch) -> bool:
    labels = all(torch.equal(one["labels"][name], two["labels"][name]) for name in one["labels"])
    return one["id"] == two["id"] and torch.equal(one["image"], two["image"]) and labels


def test_training_reads_files_once_and_sees_the_same_samples(run: Run, folder: Path) -> None:
    plain = batches(run, "")
    assert all(map(same, batches(run, folder), plain))
    blank_images(Path(run.data.root))
    assert all(map(same, batches(run, folder), plain))


@pytest.mark.slow
def test_loader_processes_share_the_folder(run: Run, folder: Path) -> None:
    plain = batches(run, "")
    run = replace(run, data=replace(run.data, workers=2))
    assert all(map(same, batches(run, folder), plain))
    blank_images(Path(run.data.root))
    assert all(map(same, batches(run, folder), plain))


def test_evaluation_keeps_nothing(tmp_path: Path, folder: Path) -> None:
    root = small_data(tmp_path / "data", num=2, num_val=2, layout="png")
    run = oracle_run(Path("x"), root, f"data.cache_dir={folder}")
    task = build_task(run)
    assert list(eval_batches(task.source(str(root), "val"), task, run.data, batch_size=2, workers=0))
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_refused_before_training(data: Path, file: Path) -> None:
    run = oracle_run(Path("x"), data, f"data.cache_dir={file / 'kept'}")
    task = build_task(run)
    with pytest.raises(UserError, match="cannot write data.cache_dir=.*Not a directory; choose another path"):
        TrainLoader(task.source(str(data), "train"), task, run.data, batch_size=4, seed=0)
