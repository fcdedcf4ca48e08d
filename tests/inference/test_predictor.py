"""What the Predictor accepts as an image, and clear errors for the rest."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.evaluation import batch_of
from tests.support.photos import noise_photo as photo
from uvim_fsq.checkpoints.loading import load_direct
from uvim_fsq.errors import UserError
from uvim_fsq.inference import pictures
from uvim_fsq.inference import predict_files as files_module
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.inference.predictions import predict_functions
from uvim_fsq.inference.predictor import Predictor


def test_one_full_size_image_at_a_time_is_held(tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(photo(tmp_path / f"{i}.png", i)) for i in range(6)]
    alive: list[int] = []
    seen: list[weakref.ref[np.ndarray]] = []
    read = pictures.read_image

    def watched(source: Any) -> np.ndarray:
        alive.append(sum(picture() is not None for picture in seen))
        image = read(source)
        seen.append(weakref.ref(image))
        return image

    for module in (pictures, files_module):
        monkeypatch.setattr(module, "read_image", watched)
    predict_files(lm_dir, files, tmp_path / "out", ["eval.batch_size=6"])
    Predictor.from_run(lm_dir, ["eval.batch_size=6"]).predict_batch(files)
    assert len(alive) == 24 and max(alive) <= 1


RGB = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        lambda file: str(file),
        lambda file: file.read_bytes(),
        lambda file: bytearray(file.read_bytes()),
        lambda file: memoryview(file.read_bytes()),
        lambda file: io.BytesIO(file.read_bytes()),
        lambda file: file.open("rb"),
        lambda file: Image.open(file),
        lambda file: np.asarray(Image.open(file)),
    ],
)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_paths_bytes_files_images_and_arrays_are_accepted(
    tmp_path: Path, lm_dir: Path, kind: str, given: Callable[[Path], Any]
) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(encoded(kind))
    predictor = Predictor.from_run(lm_dir)
    found = predictor.predict(given(file))
    assert found.shape == (20, 30) and np.array_equal(found, predictor.predict(file))


def test_grey_images_and_an_empty_batch(lm_dir: Path) -> None:
    predictor = Predictor.from_run(lm_dir)
    grey = RGB[..., 0]
    assert np.array_equal(predictor.predict(grey), predictor.predict(np.stack([grey] * 3, -1)))
    assert predictor.predict_batch([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected a file, .* got NoneType"),
        (3, "got int"),
        (torch.zeros(3, 20, 30), "got Tensor"),
        (RGB / 255, "got float64 .* make it uint8"),
        (np.full((20, 30, 3), np.nan, np.float32), "got float32 .* make it uint8"),
        (RGB[..., 0] / 255, "got float64 .* make it uint8"),
        (RGB.astype(np.int64), "got int64"),
        (RGB[..., :2], r"got uint8 \(20, 30, 2\)"),
        (RGB[:0], "no pixels"),
        (RGB[:, :0, 0], "no pixels"),
        (Image.fromarray(RGB[..., 0].astype(np.float32)), "floating-point pixels"),
        (b"", r"the image cannot be read as an image \(it is none of JPEG, PNG"),
        (encoded("png")[:200], "the image cannot be read as an image"),
        (io.StringIO("text"), "open it in binary mode"),
        ("nowhere.png", "no such image file"),
        (".", "cannot be read as an image"),
    ],
)
def test_an_unusable_image_is_one_line(lm_dir: Path, given: Any, message: str) -> None:
    predictor = Predictor.from_run(lm_dir)
    with pytest.raises(UserError, match=message) as caught:
        predictor.predict(given)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        predictor.predict_batch([RGB, given])


@pytest.mark.slow
@pytest.mark.parametrize("given", [RGB, "a.png", b"", bytearray(b"x"), Path("a.png"), Image.fromarray(RGB), None, 5])
def test_a_single_image_is_not_a_batch(lm_dir: Path, given: Any) -> None:
    with pytest.raises(UserError, match="takes a list"):
        Predictor.from_run(lm_dir).predict_batch(given)


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:99", "", "meta", "mps", "cuda" if not torch.cuda.is_available() else "xpu"]
)
def test_an_unavailable_device_is_one_line(lm_dir: Path, device: str) -> None:
    with pytest.raises(UserError, match="device=.* cannot be used") as caught:
        Predictor.from_run(lm_dir, device=device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_closed_or_text_file_is_one_line(tmp_path: Path, lm_dir: Path) -> None:
    file = photo(tmp_path / "a.png").open("rb")
    file.close()
    predictor = Predictor.from_run(lm_dir)
    with pytest.raises(UserError, match="cannot be read from the open file"):
        predictor.predict(file)
    with (tmp_path / "a.png").open(encoding="utf-8") as text, pytest.raises(UserError, match="open it in binary mode"):
        predictor.predict(text)
    with (tmp_path / "a.png").open("rb") as one, pytest.raises(UserError, match="takes a list"):
        predictor.predict_batch(one)


def test_a_direct_model_predicts_what_evaluation_sees(direct_dir: Path) -> None:
    predictor = Predictor.from_run(direct_dir)
    loaded = load_direct(direct_dir)
    batch = batch_of(loaded, 6)
    with torch.inference_mode():
        expected = predict_functions(loaded)["direct"](batch)
    assert expected.tokens is None and expected.bits is None
    found = predictor.predict_prepared(list(batch["image"].numpy()))
    assert len(found) == 6 and all(np.array_equal(a, b) for a, b in zip(found, expected.items, strict=True))
    assert predictor.predict(RGB).shape == (20, 30)


def test_an_oracle_cannot_predict_a_photo(oracle_dir: Path) -> None:
    with pytest.raises(UserError, match="is an oracle's checkpoint, which needs labels to predict"):
        Predictor.from_run(oracle_dir)
