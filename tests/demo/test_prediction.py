"""The pictures that the demo shows of a photo, and one clear line for everything that is no photo."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.support.decompression import png
from uvim_fsq.checkpoints.loading import LoadedRun, load_direct
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.demo.prediction import (
    MAX_PIXELS,
    MAX_SAMPLES,
    Decoding,
    PhotoDemo,
    TokenColors,
    cell_side,
    token_at,
)
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.oracle.quantizers.fsq import FSQ

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
CPU = torch.device("cpu")
LIMIT = [f"data.max_pixels={MAX_PIXELS}"]


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = content(Image.fromarray(PIXELS))


@pytest.fixture
def demo(random_lm: LoadedRun) -> PhotoDemo:
    return PhotoDemo(random_lm, CPU, LIMIT)


def test_a_photo_is_shown_as_predict_renders_it(demo: PhotoDemo, random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1])
    view = demo.predict(PHOTO, demo.decoding)
    expected = predictor.task.render(PIXELS, predictor.predict(PIXELS))["prediction"]
    assert np.array_equal(view.prediction, expected) and view.prediction.shape == PIXELS.shape
    assert view.legend is not None and view.tokens is not None and view.text.startswith("30 x 20 pixels")
    assert not view.samples and view.spread is None


def test_settings_are_those_of_predict(demo: PhotoDemo, random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.codes=soft", "eval.temperature=0.7", "eval.seed=3"])
    expected = predictor.task.render(PIXELS, predictor.predict(PIXELS))["prediction"]
    own = demo.predict(PHOTO).prediction
    assert not np.array_equal(own, expected)
    assert np.array_equal(demo.predict(PHOTO, Decoding("soft", 0.7, seed=3)).prediction, expected)
    assert np.array_equal(demo.predict(PHOTO, demo.decoding).prediction, own)
    assert np.array_equal(demo.predict(PHOTO).prediction, own)


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        (Decoding(steps=4), "does not decode in steps"),
        (Decoding(temperature=-1), "eval.temperature=-1.0: must not be negative"),
        (Decoding(samples=3), "because eval.temperature is 0; set it to e.g. 1"),
        (Decoding(codes="mean"), "eval.codes"),
        (Decoding(samples=MAX_SAMPLES + 1, temperature=1), "this page shows 1 to 16"),
    ],
)
def test_settings_that_the_run_does_not_support_are_refused(demo: PhotoDemo, decoding: Decoding, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        demo.predict(PHOTO, decoding)
    assert "\n" not in str(caught.value)
    assert demo.predict(PHOTO).prediction.shape == PIXELS.shape


def test_samples_are_shown_in_colors_that_mean_the_same(demo: PhotoDemo, random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.temperature=1"])
    found = predictor.predict_samples(PIXELS, 3)
    view = demo.predict(PHOTO, Decoding(temperature=1, samples=3))
    frames = [predictor.task.film_frame(PIXELS, item) for item in found.predictions]
    assert all(np.array_equal(a, b) for a, b in zip(view.samples, frames, strict=True))
    assert view.spread is not None and view.spread.shape == PIXELS.shape and view.spread_legend is not None
    assert found.spread is not None
    brightest = view.spread.reshape(-1, 3)[found.spread.argmax()]
    assert brightest.sum() == view.spread.sum(-1).max()


def test_equal_samples_have_no_spread(demo: PhotoDemo) -> None:
    view = demo.predict(PHOTO, Decoding(temperature=1e-6, samples=2))
    assert (
        np.array_equal(view.samples[0], view.samples[1])
        and view.spread is None
        and view.text.endswith("all samples are equal")
    )


def test_too_many_samples_of_a_large_photo_are_refused(demo: PhotoDemo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvim_fsq.demo.prediction.MAX_SAMPLED", 1300)
    assert len(demo.predict(PHOTO, Decoding(temperature=1, samples=2)).samples) == 2
    with pytest.raises(UserError, match="take at most 2, or a smaller picture"):
        demo.predict(PHOTO, Decoding(temperature=1, samples=3))


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (b"", "cannot be read as an image"),
        (b"<html>not a picture</html>" * 50, "cannot be read as an image"),
        (PHOTO[: len(PHOTO) // 2], "cannot be read as an image"),
        (png(6000, 5000, depth=1, colors=0), "30 million pixels, but data.max_pixels allows 25 million"),
        (png(20_000, 10_000, depth=1, colors=0), "more than twice the 25 million pixels that data.max_pixels allows"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "cannot be read as an image"),
    ],
    ids=["empty", "text", "truncated", "large", "bomb", "svg"],
)
def test_what_is_no_photo_is_refused_in_one_line(random_lm: LoadedRun, photo: bytes, message: str) -> None:
    demo = PhotoDemo(random_lm, CPU, LIMIT)
    demo.predict(PHOTO, demo.decoding)
    limit_pixels(10**9)  # by another run
    with pytest.raises(UserError, match=message) as caught:
        demo.predict(photo, demo.decoding)
    assert "\n" not in str(caught.value)
    assert demo.predict(PHOTO, demo.decoding).prediction.shape == PIXELS.shape


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.mark.parametrize(
    ("photo", "shape"),
    [
        (content(Image.fromarray(PIXELS).convert("P")), (20, 30, 3)),
        (content(Image.fromarray(PIXELS).convert("LA")), (20, 30, 3)),
        (content(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)), (20, 30, 3)),
        (content(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), (20, 30, 3)),
        (content(Image.fromarray(PIXELS), "JPEG", exif=rotated()), (30, 20, 3)),
    ],
    ids=["palette", "alpha", "16-bit", "CMYK", "rotated"],
)
def test_photos_of_all_kinds_are_predicted_upright(demo: PhotoDemo, photo: bytes, shape: tuple[int, ...]) -> None:
    assert demo.predict(photo).prediction.shape == shape


def test_a_direct_model_has_a_prediction_and_no_tokens(direct_dir: Path) -> None:
    demo = PhotoDemo(load_direct(direct_dir), CPU, LIMIT)
    view = demo.predict(PHOTO)
    assert demo.decoding is None and view.prediction.shape == PIXELS.shape
    assert view.tokens is None and not view.samples


def test_a_click_on_a_token_map_finds_the_token() -> None:
    tokens = np.arange(9)
    colors = TokenColors(FSQ((5, 5)))
    picture, cell = colors.draw(tokens), cell_side(9)
    assert picture is not None and picture.shape == (3 * cell, 3 * cell, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 9
    for token in range(9):
        x, y = (token % 3 + 0.5) * cell, (token // 3 + 0.99) * cell
        assert token_at(x, y, 9) == token
        marked = colors.draw(tokens, [token])
        assert marked is not None
        changed = np.argwhere((marked != picture).any(-1))
        assert {token_at(c, r, 9) for r, c in changed} == {token}
    assert token_at(-1, 0, 9) is None and token_at(0, 3 * cell, 9) is None
