"""The colorization task: gray input, labels, brightness, unusual photos."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import uvim_fsq.tasks.imagenet_color.task as task_module
from tests.support.photos import LUMA
from tests.support.photos import random_photo as photo
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch
from uvim_fsq.tasks.imagenet_color.metrics import to_unit
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig

RNG = np.random.default_rng(0)
TASK = ImagenetColor(ImagenetColorConfig())


def test_labels_are_the_photo() -> None:
    sample = photo()
    np.testing.assert_array_equal(TASK.encode(sample)["color"], sample.image)
    travelling = torch.from_numpy(TASK.encode(sample)["color"])[None]
    batch = Batch(image=travelling, labels={"color": travelling}, index=torch.zeros(1), id=["x"])
    label = to_device(batch, torch.device("cpu"))["labels"]["color"][0].numpy()
    # Bit for bit what the host would compute.
    assert travelling.dtype == torch.uint8
    np.testing.assert_array_equal(label, to_unit(sample.image, sample))
    assert label.dtype == np.float32 and label.min() >= -1 and label.max() <= 1


def test_gray_is_the_product_with_the_weights() -> None:
    image = RNG.integers(0, 256, (400, 301, 3), dtype=np.uint8)
    weights = np.array(LUMA, np.float32) / np.float32(255)
    expected = ((image.astype(np.float32) @ weights) * np.float32(255.5)).astype(np.uint8)
    for view, gray in ((image, expected), (image[:, ::-1], expected[:, ::-1]), (image[7:9, 3:6], expected[7:9, 3:6])):
        np.testing.assert_array_equal(task_module.gray(view), np.repeat(gray[..., None], 3, -1))


def test_unusual_photos_are_read_and_broken_ones_named(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "odd"
    (folder / "train").mkdir(parents=True)
    (folder / "val").mkdir()
    frames = [Image.fromarray(RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "train" / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "train" / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(RNG.integers(0, 65536, (24, 40), dtype=np.uint16)).save(folder / "train" / "deep.png")
    frames[1].convert("P").save(folder / "train" / "palette.png")
    Image.new("RGB", (9, 30)).save(folder / "train" / "tiny.png")
    frames[2].save(folder / "val" / "good.png")
    (folder / "val" / "text.jpg").write_text("<html>404</html>")
    source = TASK.source(str(folder), "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = {source[i].id: source[i].image for i in range(len(source))}
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in read.values())
    for name in ("train/moving.png", "train/moving.webp"):
        np.testing.assert_array_equal(read[name], np.asarray(frames[0]))  # the first frame
    lines, ok = check_data("imagenet_color", str(folder))
    text = json.dumps(lines)
    assert not ok and "val/text.jpg cannot be read as an image" in text and "tiny.png: only (30, 9) pixels" in text
