"""Folders of one's own depth data, and what people get wrong about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.small import lm_run, oracle_run, small_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.folders import and_list
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import open_source
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig
from uvim_fsq.training.run import train

CONFIG = NYUDepthConfig(protocol="full")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ with 12 pairs, val/ with 4."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for kind in ("images", "depth"):
            (tmp_path / "set" / split / kind).mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "set" / split / "images" / f"{split}{i}.jpg")
            depth = rng.uniform(1, 5, (24, 32)).astype(np.float32)
            np.save(tmp_path / "set" / split / "depth" / f"{split}{i}.npy", depth)
    return tmp_path / "set"


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (("train", "training"), "train", "found training/ and val/, but no train/: rename training/ to train/"),
        (("train", "TRAIN"), "train", "found TRAIN/ and val/, but no train/: rename TRAIN/ to train/"),
        (("train", None), "train", "found val/, but no train/: add train/"),
        (("train", None), "holdout", "found val/, but no train/"),
        (("val", "validation"), "val", "found train/ and validation/, but no val/: rename validation/ to val/"),
        (("val", "test"), "val", "found test/ and train/, but no val/: rename test/ to val/"),
        (("train/depth", None), "train", "train holds images/, but no depth/; set task.depth_dir"),
        (("train/depth", "train/depths"), "train", "train holds depths/ and images/, but no depth/; set"),
        (
            ("train/images", "train/rgb"),
            "train",
            "train holds depth/ and rgb/, but no images/; set task",
        ),
    ],
)
def test_misnamed_folders(root: Path, above: bool, change: tuple[str, str | None], split: str, message: str) -> None:
    """The finder took val/ for the data set and trained on it, or named one sample too few for a batch."""
    old, new = change
    if new is None:
        shutil.rmtree(root / old)
    else:
        (root / old).rename(root / new)
    with pytest.raises(UserError, match=message):
        open_source(str(root.parent if above and "/" not in old else root), split, CONFIG)


def test_lists_of_names() -> None:
    assert [and_list("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert and_list("abcdef") == "a, b, c, d, e and f" and and_list("abcdefgh") == "a, b, c, d, e, f and 2 more"


def test_both_misnamed_and_nothing_of_it(root: Path) -> None:
    (root / "train").rename(root / "training")
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match="found training/ and validation/, but no train/: rename training/ to train/"):
        open_source(str(root), "val", CONFIG)
    lines, ok = check_data("nyu_depth", str(root), ["task.protocol=full"])
    assert not ok and all("no train/" in line for line in lines)
    shutil.rmtree(root / "training")
    (root / "validation").rename(root / "other")
    shutil.rmtree(root / "other/depth")
    with pytest.raises(UserError, match="no depth data found"):
        open_source(str(root), "val", CONFIG)


@pytest.mark.parametrize("name", ["training", "Train"])
def test_misnamed_fastdepth(tmp_path: Path, name: str) -> None:
    data = small_data(tmp_path / "set", num=3, num_val=2) / "nyudepthv2"
    (data / "train").rename(data / name)
    with pytest.raises(UserError, match=f"but no train/: rename {name}/ to train/"):
        open_source(str(data), "train", CONFIG)
    assert len(open_source(str(data), "val", CONFIG)) == 2


def test_what_is_there_is_used(root: Path) -> None:
    shutil.rmtree(root / "train")
    assert len(open_source(str(root), "val", CONFIG)) == 4
    assert len(open_source(str(root.parent), "val", CONFIG)) == 4


@pytest.mark.parametrize("folder", ["images", "depth"])
def test_two_files_of_one_name(root: Path, folder: str) -> None:
    first = sorted((root / "train" / folder).iterdir())[0]
    shutil.copy(first, first.with_suffix(".png"))
    with pytest.raises(UserError, match=f"{first.name} and train0.png have the same name"):
        open_source(str(root), "train", CONFIG)


def test_two_samples_of_one_name(tmp_path: Path) -> None:
    root = small_data(tmp_path / "set", num=3, num_val=1, layout="png")
    (listed,) = root.glob("*train*files*.txt")
    listed.write_text(listed.read_text() + listed.read_text().splitlines()[1] + "\n")
    lines, ok = check_data("nyu_depth", str(root), ["task.protocol=full"])
    assert not ok and any("samples 2 and 4 are both room_0001a/rgb_00001.jpg" in line for line in lines)


@pytest.mark.parametrize("scale", [0.0, -1000.0, float("nan"), float("inf")])
def test_impossible_scales(scale: float) -> None:
    """0 was read as null."""
    with pytest.raises(UserError, match="task.depth_scale=.* a number above 0"):
        NYUDepth(NYUDepthConfig(depth_scale=scale))


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("steps", [6, 30])
def test_nothing_to_learn_from(root: Path, tmp_path: Path, steps: int, quantizer: str) -> None:
    """Training ran to its end with a loss of 0."""
    for file in root.glob("*/depth/*.npy"):
        np.save(file, np.zeros((24, 32), np.float32))
    kind = [] if quantizer == "fsq" else ["model.quantizer.kind=vq", "model.quantizer.codebook_size=16"]
    run = oracle_run(tmp_path / "run", root, f"train.steps={steps}", *kind)
    with pytest.raises(UserError, match=rf"loss of the first {min(steps, 10)} steps is exactly 0: no pixel has a"):
        train(run)


def test_a_few_labels_are_enough(root: Path, tmp_path: Path) -> None:
    for file in sorted(root.glob("train/depth/*.npy"))[1:]:
        np.save(file, np.zeros((24, 32), np.float32))
    out = train(oracle_run(tmp_path / "run", root, "train.steps=12"))
    train(lm_run(tmp_path / "lm", out, "train.steps=11"))
