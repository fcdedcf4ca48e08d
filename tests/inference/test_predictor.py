"""What the Predictor accepts as an image, and clear errors for the rest."""

from __future__ import annotations

import io
import threading
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
from tests.support.runs import save_untrained
from tests.support.small import lm_run
from uvim_fsq.checkpoints import loading
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint, load_direct
from uvim_fsq.config.plugins import trusting, trusts_runs
from uvim_fsq.errors import UserError
from uvim_fsq.inference import pictures
from uvim_fsq.inference import predict_files as files_module
from uvim_fsq.inference.code_decoding import sample_seeds
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.inference.predictions import image_decoder, predict_functions
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.lm.image_encoder import ImageEncoder


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


def test_gray_images_and_an_empty_batch(lm_dir: Path) -> None:
    predictor = Predictor.from_run(lm_dir)
    gray = RGB[..., 0]
    assert np.array_equal(predictor.predict(gray), predictor.predict(np.stack([gray] * 3, -1)))
    assert predictor.predict_batch([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected a file, .* got NoneType"),
        (3, "got int"),
        (torch.zeros(20, 30, 3), r"expected a \(3, H, W\) RGB tensor, got float32 \(20, 30, 3\)"),
        (torch.zeros(2, 3, 20, 30), "got float32 .*use predict_batch for several"),
        (torch.zeros(3, 20, 30, dtype=torch.int64), "uint8 or floating point in .*, got int64"),
        (torch.full((3, 20, 30), 255.0), "values in .0, 1., got 255 to 255; undo its normalization"),
        (torch.full((3, 20, 30), -0.1), "got -0.1 to -0.1"),
        (torch.full((3, 20, 30), torch.nan), "got nan to nan"),
        (torch.zeros(3, 0, 30), "no pixels"),
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_the_same_pictures_as_arrays(dtype: torch.dtype) -> None:
    # bfloat16 has too few digits for most values of uint8.
    image = RGB // 51 * 51 if dtype == torch.bfloat16 else RGB
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    if dtype.is_floating_point:
        tensor = tensor.to(dtype) * (1 / 255)
    assert np.array_equal(pictures.pixels_of(tensor), image)


def test_a_tensor_with_a_gradient_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert pictures.pixels_of(torch.full((3, 2, 2), 0.2, requires_grad=True)).max() == 51
    assert not [str(warning.message) for warning in recwarn]


def test_values_of_tensors_are_rounded_to_the_nearest() -> None:
    assert (pictures.pixels_of(torch.full((3, 2, 4), 200.7 / 255)) == 201).all()


def test_a_batch_of_tensors_is_predicted_like_its_pictures(random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.batch_size=2"])
    images = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = [predictor.predict(image) for image in images]
    assert not np.array_equal(expected[0], expected[1])
    for given in (tensor, list(tensor), tensor.double() / 255, iter(images)):
        found = predictor.predict_batch(given)
        assert len(found) == 3 and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(UserError, match="takes a list"):
        predictor.predict_batch(tensor[0])


def test_samples_differ_and_the_first_is_the_prediction(random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.temperature=1", "eval.batch_size=2"])
    samples = predictor.predict_samples(RGB, num=5)
    assert len(samples.predictions) == 5
    assert np.array_equal(samples.predictions[0], predictor.predict(RGB))
    assert len({sample.tobytes() for sample in samples.predictions}) > 1
    assert samples.spread is not None
    np.testing.assert_allclose(samples.spread, np.std(samples.predictions, axis=0), atol=1e-5)
    again = predictor.predict_samples(RGB, num=3).predictions
    assert all(np.array_equal(a, b) for a, b in zip(again, samples.predictions, strict=False))


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_several_samples_encode_the_image_once_and_equal_a_batch_of_it(
    tmp_path: Path, random_runs: tuple[Path, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_untrained(lm_run(tmp_path / "lm", random_runs[0], f"model.kind={kind}"))
    predictor = Predictor.from_run(run, ["eval.temperature=1", "eval.batch_size=3"])
    loaded = load_checkpoint(run, ["eval.temperature=1"])
    assert loaded.lm is not None
    encoded: list[int] = []
    plain = ImageEncoder.forward

    def counted(self: ImageEncoder, image: torch.Tensor) -> torch.Tensor:
        encoded.append(len(image))
        return plain(self, image)

    monkeypatch.setattr(ImageEncoder, "forward", counted)
    samples = predictor.predict_samples(RGB, num=5)
    assert encoded == [1, 1]  # once for each of the two batches
    image = torch.from_numpy(predictor.prepare(RGB))[None]
    seeds = torch.cat([sample_seeds(torch.tensor([0]), number) for number in range(5)])
    with torch.inference_mode():
        items, tokens = image_decoder(loaded, torch.device("cpu"))(image.repeat(5, 1, 1, 1), seeds)
    assert tokens is not None and np.array_equal(samples.tokens, tokens.numpy())
    for item, found in zip(items, samples.predictions, strict=True):
        assert np.array_equal(predictor.task.to_size(item, RGB), found)


def test_other_settings_share_the_models_and_predict_as_if_loaded_with_them(random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.temperature=1"])
    changed = predictor.with_overrides(["eval.codes=soft", "task.decoding=expectation"])
    assert changed._loaded.lm is predictor._loaded.lm  # pyright: ignore[reportAttributeAccessIssue]
    alone = Predictor.from_run(random_runs[1], ["eval.codes=soft", "task.decoding=expectation"])
    assert np.array_equal(changed.predict(RGB), alone.predict(RGB))
    assert changed.fingerprint == alone.fingerprint and changed.provenance == alone.provenance
    with pytest.raises(UserError, match="does not decode in steps"):
        predictor.with_overrides(["eval.steps=4"])
    with pytest.raises(UserError, match="cannot change it"):
        predictor.with_overrides(["oracle=elsewhere"])


def test_other_settings_are_trusted_as_the_run_was_also_in_another_thread(
    random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UVIM_FSQ_TRUST", raising=False)
    trusted: list[bool] = []
    with trusting():
        predictor = Predictor.from_run(random_runs[1])
    plain = loading.with_overrides
    monkeypatch.setattr(
        "uvim_fsq.inference.predictor.with_overrides", lambda *a: (trusted.append(trusts_runs()), plain(*a))[1]
    )
    thread = threading.Thread(target=predictor.with_overrides, args=[["eval.codes=soft"]])
    thread.start()
    thread.join()
    assert trusted == [True]


def test_the_tokens_of_a_prediction_are_those_of_the_first_sample(random_runs: tuple[Path, Path]) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.temperature=1"])
    depth, tokens = predictor.predict_with_tokens(RGB)
    assert np.array_equal(depth, predictor.predict(RGB))
    assert tokens is not None and np.array_equal(tokens, predictor.predict_samples(RGB, num=2).tokens[0])


@pytest.mark.parametrize(
    ("overrides", "num", "message"),
    [
        ([], 4, "all samples would be the same, because eval.temperature is 0"),
        (["eval.temperature=1", "eval.samples=2"], 4, "needs eval.samples=1"),
        (["eval.temperature=1"], 0, "num=0: needs a whole number of samples"),
        (["eval.temperature=1"], 2.5, "num=2.5: needs a whole number"),
    ],
)
def test_samples_that_make_no_sense_are_refused(
    random_runs: tuple[Path, Path], overrides: list[str], num: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Predictor.from_run(random_runs[1], overrides).predict_samples(RGB, num)


def test_a_direct_model_draws_no_samples(direct_dir: Path) -> None:
    with pytest.raises(UserError, match="a direct model draws no samples"):
        Predictor.from_run(direct_dir).predict_samples(RGB, 2)


def test_a_moved_predictor_predicts_the_same(random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(LoadedRun, "to", lambda self, device: moved.append(device))
    predictor = Predictor.from_run(random_runs[1], device="cpu")
    expected = predictor.predict(RGB)
    assert predictor.to("cpu") is predictor and np.array_equal(predictor.predict(RGB), expected)
    # With an index it is another device, so that everything is moved and made anew.
    moved.clear()
    assert predictor.to(torch.device("cpu", 0)).device == torch.device("cpu", 0) == moved[0]
    assert np.array_equal(predictor.predict(RGB), expected)
    with pytest.raises(UserError, match="cannot be used"):
        predictor.to("nowhere")
    assert np.array_equal(predictor.predict(RGB), expected)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_picture_whose_file_is_closed_is_one_line(kind: str) -> None:
    with Image.open(io.BytesIO(encoded(kind))) as image:
        pass
    with pytest.raises(UserError, match="the picture cannot be used .*closed"):
        pictures.pixels_of(image)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, 5).to_sparse(),
        torch.zeros(3, 4, 5, device="meta"),
        torch.zeros(3, 4, 5, device="meta", dtype=torch.uint8),
        torch.zeros(3, 4, 5).to(torch.float8_e4m3fn),
    ],
)
def test_tensors_without_usual_values_are_one_line(tensor: torch.Tensor) -> None:
    with pytest.raises(UserError, match="a tensor of torch.* cannot be used; give a dense one") as caught:
        pictures.pixels_of(tensor)
    assert "\n" not in str(caught.value)


def test_a_predictor_that_cannot_be_moved_stays_where_it_is(
    random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, places = Predictor(random_lm, "cpu"), list[str]()

    def move(self: LoadedRun, device: torch.device) -> None:
        places.append(str(device))
        if len(places) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoadedRun, "to", move)
    with pytest.raises(UserError, match="choose another device"):
        predictor.to(torch.device("cpu", 0))
    assert places == ["cpu:0", "cpu"] and predictor.device == torch.device("cpu")


def test_a_moved_predictor_is_trusted_as_before(random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted: list[bool] = []
    monkeypatch.setattr("uvim_fsq.inference.predictor.image_decoder", lambda *_: trusted.append(trusts_runs()))
    for trust in (True, False):
        with trusting(trust):
            predictor = Predictor(random_lm, "cpu")
        predictor.to(torch.device("cpu", 0))
    assert trusted == [True, True, False, False]
