"""The colour task: grey images, PSNR, FID's protocol with a stand-in for the Inception network, prediction."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import uvim_fsq.tasks.imagenet_color.data as photos
import uvim_fsq.tasks.imagenet_color.task as task_module
from tests.support.golden import golden
from tests.support.small import LM, ORACLE
from uvim_fsq.checkpoints.loading import load_checkpoint, resolve
from uvim_fsq.cli import main
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch, Sample
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predictor import predict_files
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize, prediction_uint8
from uvim_fsq.tasks.imagenet_color.fid import DIM, Moments, frechet_distance
from uvim_fsq.tasks.imagenet_color.metrics import FIDMetric, PSNRMetric, keep_luma, to_unit
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.training.run import train

RNG = np.random.default_rng(0)
TASK = ImagenetColor(ImagenetColorConfig())
LUMA = np.array([0.2989, 0.5870, 0.1140])


class FakeInception:
    """Coarse colours instead of features: as many numbers, and as sensitive to every step before the network."""

    sha256 = "fake"
    calls: list[tuple[int, ...]] = []

    def __init__(self, weights: str, device: torch.device) -> None:
        del weights, device

    def features(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and images.shape[1:] == (256, 256, 3)
        FakeInception.calls.append(images.shape)
        coarse = images.reshape(len(images), 16, 16, 16, 16, 3).mean((2, 4)).reshape(len(images), -1) / 255
        return np.pad(coarse, ((0, 0), (0, DIM - coarse.shape[1])))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[tuple[int, ...]]:
    monkeypatch.setattr(task_module, "Inception", FakeInception)
    FakeInception.calls = []
    return FakeInception.calls


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 training and 5 validation photos of 32 x 24, named as ImageNet's."""
    write_dataset("imagenet", tmp_path / "in", 12, (24, 32), num_val=5, workers=1)
    return tmp_path / "in"


def fid_task(protocol: Any = "fid", **options: Any) -> ImagenetColor:
    return ImagenetColor(ImagenetColorConfig(protocol=protocol, inception_weights="fake", **options))


def photo(height: int = 20, width: int = 30) -> Sample:
    return Sample("x", RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


# Images and labels


def test_grey_image_golden() -> None:
    numbers = golden("pipeline.npz")
    np.testing.assert_array_equal(TASK.model_image(Sample("x", numbers["gray/in"])), numbers["gray/uint8_out"])
    view = Sample("x", numbers["gray/in"], {}, {"scale": 128.0})
    np.testing.assert_array_equal(TASK.encode(view)["color"], numbers["gray/float_in"])
    np.testing.assert_allclose(TASK.model_image(view), numbers["gray/float_out"], atol=1e-6)


def test_labels_are_the_photo() -> None:
    sample = photo()
    np.testing.assert_array_equal(TASK.encode(sample)["color"], sample.image)
    travelling = torch.from_numpy(TASK.encode(sample)["color"])[None]
    batch = Batch(image=travelling, labels={"color": travelling}, index=torch.zeros(1), id=["x"])
    label = to_device(batch, torch.device("cpu"))["labels"]["color"][0].numpy()
    # To the last bit what the host would make of it.
    assert travelling.dtype == torch.uint8
    np.testing.assert_array_equal(label, to_unit(sample.image, sample))
    assert label.dtype == np.float32 and label.min() >= -1 and label.max() <= 1


def test_grey_is_the_product_with_the_weights() -> None:
    image = RNG.integers(0, 256, (400, 301, 3), dtype=np.uint8)
    weights = np.array(LUMA, np.float32) / np.float32(255)
    expected = ((image.astype(np.float32) @ weights) * np.float32(255.5)).astype(np.uint8)
    for view, grey in ((image, expected), (image[:, ::-1], expected[:, ::-1]), (image[7:9, 3:6], expected[7:9, 3:6])):
        np.testing.assert_array_equal(task_module.grey(view), np.repeat(grey[..., None], 3, -1))


def test_fid_view_is_the_cropped_area_resized_photo() -> None:
    sample, task = photo(600, 700), fid_task()
    view = task.evaluation_view(sample)
    np.testing.assert_array_equal(view.image, crop_and_resize(sample.image, 512))
    image, labels, kept = JointTransform(DataConfig(image_size=512), task, train=False)(sample, 0)
    np.testing.assert_array_equal(labels["color"], view.image.astype(np.float32) / 128 - 1)
    grey = labels["color"] @ LUMA.astype(np.float32)
    np.testing.assert_allclose(image, np.broadcast_to(grey, (3, 512, 512)), atol=1e-5)
    np.testing.assert_array_equal(kept.meta["photo"], sample.image)


# PSNR and the photo's own brightness


def test_psnr_by_hand() -> None:
    image = np.full((4, 4, 3), 255, np.uint8)
    metric = PSNRMetric("p", luma=False)
    assert metric.update(np.zeros((4, 4, 3), np.float32), Sample("a", image)) == pytest.approx(
        {"psnr": 10 * np.log10(4), "mse": 1.0}
    )
    assert metric.update(np.full((4, 4, 3), 0.9, np.float32), Sample("b", image))["psnr"] == pytest.approx(
        10 * np.log10(4 / 0.01), abs=1e-4
    )
    figures = metric.compute()
    assert figures["psnr"] == pytest.approx((10 * np.log10(4) + 10 * np.log10(400)) / 2, abs=1e-4)  # mean over images
    assert figures["images"] == 2
    assert metric.update(np.ones((4, 4, 3), np.float32), Sample("c", image))["psnr"] == 100  # equal pictures
    with pytest.raises(UserError, match="no image was evaluated"):
        PSNRMetric("p", luma=False).compute()


def test_keep_luma_changes_the_brightness_and_nothing_else() -> None:
    prediction, image = RNG.uniform(-0.3, 0.3, (2, 6, 6, 3)).astype(np.float32)
    kept = keep_luma(prediction, image)
    np.testing.assert_allclose(kept @ LUMA, image @ LUMA, atol=1e-6)
    for a, b in ((0, 1), (1, 2)):  # differences between channels are the colour
        np.testing.assert_allclose(kept[..., a] - kept[..., b], prediction[..., a] - prediction[..., b], atol=1e-6)
    assert keep_luma(np.ones_like(image), -np.ones_like(image)).min() >= -1
    sample = photo(8, 8)
    task = ImagenetColor(ImagenetColorConfig(keep_luma=True))
    metric = task.metric(object())
    assert metric.protocol == "imagenet_color/psnr+keep_luma"
    grey, label = (to_unit(x, sample) for x in (TASK.model_image(sample), TASK.encode(sample)["color"]))
    right_colour = label + RNG.uniform(-0.2, 0.2, (8, 8, 1)).astype(np.float32)
    inside = np.abs(right_colour).max() <= 1
    assert metric.update(right_colour, sample)["mse"] < (1e-10 if inside else 1e-2)
    assert metric.update(grey, sample)["mse"] > 1e-3


# FID's protocol


def expected_fid(predictions: np.ndarray, reference: list[np.ndarray]) -> float:
    """From scratch: integers at 256, features of all at once, moments, distance."""
    fake = FakeInception("", torch.device("cpu"))
    sets = [
        np.stack([prediction_uint8(p) for p in predictions]),
        np.stack([crop_and_resize(r, 256) for r in reference]),
    ]
    moments = [Moments(), Moments()]
    for one, images in zip(moments, sets, strict=True):
        one.add(fake.features(images))
    return frechet_distance(*moments)


def test_fid_of_a_split_against_training_photos(root: Path, fake: list[tuple[int, ...]], own_cache: Path) -> None:
    task = fid_task()
    source = task.source(str(root), "val")
    samples = [task.evaluation_view(source[i]) for i in range(5)]
    predictions = RNG.uniform(-1, 1, (5, 64, 64, 3)).astype(np.float32)
    parts = [task.metric(source) for _ in range(3)]
    for i, sample in enumerate(samples):
        parts[0].update(predictions[i], sample)
        parts[1 + i % 2].update(predictions[i], sample)
    whole = parts[0].compute()
    train_photos = [photos.open_source(str(root), "train")[i].image for i in range(12)]
    assert whole["FID-5"] == pytest.approx(expected_fid(predictions, train_photos), rel=1e-9)
    assert whole["FID-5 of the real images"] < whole["FID-5"]
    assert whole["reference_images"] == 12 and whole["images"] == 5 and "psnr" in whole
    assert not [name for name in whole if "5k" in name]
    merged = task.metric(source)
    states = [part.state() for part in parts[1:]]
    merged.load_state({name: states[0][name] + states[1][name] for name in states[0]})
    assert merged.compute() == pytest.approx(whole, rel=1e-9)
    assert len(list(own_cache.glob("fid_reference-*.npz"))) == 1
    before = len(fake)
    again = task.metric(source)
    again.load_state(parts[0].state())
    assert again.compute() == whole and len(fake) == before  # the reference came from the cache


def test_real_predictions_have_the_distance_of_the_real_images(root: Path, fake: list[tuple[int, ...]]) -> None:
    task = fid_task()
    source = task.source(str(root), "val")
    metric = task.metric(source)
    for i in range(5):
        sample = task.evaluation_view(source[i])
        # 512 -> 256 by the protocol's own steps: not quite the photo's direct way to 256.
        metric.update(task.encode(sample)["color"], sample)
    figures = metric.compute()
    assert figures["FID-5"] == pytest.approx(figures["FID-5 of the real images"], rel=0.05)
    assert metric.protocol == "imagenet_color/fid" and figures["psnr"] == 100


def test_coltran_lists_are_called_fid_5k_in_full_only(
    root: Path, fake: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {
        "coltran_evaluation": lambda: [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1)],
        "coltran_reference": lambda: [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 5, 4)],
    }
    for name, names in lists.items():
        monkeypatch.setitem(photos.COLTRAN, name, names)
    task = fid_task("coltran")
    source = task.source(str(root), "val")
    assert [source[i].meta["name"] for i in range(2)] == lists["coltran_evaluation"]()
    metric = task.metric(source)
    assert isinstance(metric, FIDMetric) and metric.official
    for i in range(2):
        metric.update(np.zeros((16, 16, 3), np.float32), task.evaluation_view(source[i]))
    figures = metric.compute()
    assert figures["reference_images"] == 3 and "FID-2" in figures and "FID-5k" not in figures
    for i in range(2):
        metric.update(np.zeros((512, 512, 3), np.float32), task.evaluation_view(source[i]))
    assert not metric.official  # a smaller model's pictures were among them
    train_split = task.source(str(root), "train")
    other = task.metric(train_split)
    assert isinstance(other, FIDMetric) and not other.official
    monkeypatch.undo()
    with pytest.raises(UserError, match="4999 of the 5000 photos|5000 of the 5000 photos|missing, the first is"):
        ImagenetColor(ImagenetColorConfig(protocol="coltran")).source(str(root), "val")


def test_what_evaluation_lacks_is_said_before_training(root: Path, tmp_path: Path, own_cache: Path) -> None:
    section = {"task": {"name": "imagenet_color", "protocol": "fid"}}
    with pytest.raises(UserError, match="FID needs the Inception weights"):
        train(resolve(load_run({**ORACLE, **section}, [f"train.out={tmp_path / 'o'}", f"data.root={root}"])))
    assert not list((tmp_path / "o").glob("checkpoints/*"))
    lines, ok = check_data("imagenet_color", str(root), ["task.protocol=fid"])
    assert not ok and any("FID needs the Inception weights" in line for line in lines)
    (root / "train").rename(root / "elsewhere")
    task = fid_task()
    with pytest.raises(UserError, match="found elsewhere/ and val/, but no train/"):
        task.metric(task.source(str(root), "val"))


def test_training_watches_its_own_split(root: Path, tmp_path: Path) -> None:
    section = {"task": {"name": "imagenet_color"}}
    keys = [f"train.out={tmp_path / 'o'}", f"data.root={root}", "data.selection_split=holdout", "train.eval_every=3"]
    out = train(resolve(load_run({**ORACLE, **section}, keys)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [1, 1]  # a tenth of 12 photos
    result = json.loads((out / "evaluation.json").read_text())
    assert result["images"] == 5 and result["chosen"] == "best psnr on holdout, 1 images"
    for protocol in ("fid", "coltran"):
        assert load_checkpoint(out, [f"task.protocol={protocol}"]).chosen == "last", "PSNR picked what FID reports"


def test_fid_mistakes(root: Path) -> None:
    task = ImagenetColor(ImagenetColorConfig(protocol="fid"))
    with pytest.raises(UserError, match=r"there is no file ''; download https://.* task.inception_weights=PATH"):
        task.metric(task.source(str(root), "val"))
    task = fid_task(fid_reference="val")
    with pytest.raises(UserError, match="fid_reference=val is the evaluation split itself"):
        task.metric(task.source(str(root), "val"))


# From training to pictures


def test_train_evaluate_and_colourise_photos(root: Path, tmp_path: Path, fake: list[tuple[int, ...]]) -> None:
    oracle, lm = tmp_path / "oracle", tmp_path / "lm"
    section = {"task": {"name": "imagenet_color"}}
    train(resolve(load_run({**ORACLE, **section}, [f"train.out={oracle}", f"data.root={root}"])))
    train(resolve(load_run(LM, [f"train.out={lm}", f"oracle={oracle}"])))
    result = evaluate(lm, baseline=True, report=tmp_path / "report.html")
    assert result["protocol"] == "imagenet_color/psnr" and result["baseline"] == "the grey photo itself"
    assert result["data"]["official_count"] == 50_000 and result["images"] == 5
    page = (tmp_path / "report.html").read_text()
    assert "imagenet_color/psnr" in page and page.count("data:image/png") >= 3
    fid = evaluate(lm, ["task.protocol=fid", "task.inception_weights=x", "task.keep_luma=true"], baseline=True)
    assert fid["protocol"] == "imagenet_color/fid+keep_luma" and fid["figures"]["lm"]["FID-5"] > 0
    assert fid["figures"]["baseline"]["FID-5"] > fid["figures"]["baseline"]["FID-5 of the real images"]

    colour, grey = tmp_path / "colour.png", tmp_path / "grey.png"
    image = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(image).save(colour)
    Image.fromarray(TASK.model_image(Sample("x", image))[..., 0]).save(grey)
    plain, kept = ({}, {}), ["task.keep_luma=true"]
    plain = predict_files(lm, [str(colour), str(grey)], tmp_path / "plain")
    named = predict_files(lm, [str(colour)], tmp_path / "named", kept)
    pictures = [np.asarray(Image.open(entry["color"])) for entry in plain]
    assert pictures[0].shape == pictures[1].shape == (37, 53, 3) and Path(plain[0]["color"]).name == "colour_color.png"
    # The models see the grey version only; the grey file's is 0.01 % darker, so that a few levels differ by one.
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() < 2
    own = np.asarray(Image.open(named[0]["keep_luma"])).astype(float)
    assert Path(named[0]["keep_luma"]).name == "colour_keep_luma.png"
    unclipped = (own > 0).all(-1) & (own < 255).all(-1)
    np.testing.assert_allclose((own @ LUMA)[unclipped], (image @ LUMA)[unclipped], atol=1)


def test_lists_and_checks_from_the_command_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    main(["data", "coltran-lists", "--out", str(tmp_path / "lists")])
    written = sorted(path.name for path in (tmp_path / "lists").iterdir())
    assert written == ["coltran_evaluation.txt", "coltran_reference.txt"] and "lists" in capsys.readouterr().out
    main(["data", "check", str(root), "--task", "imagenet_color"])
    said = capsys.readouterr().out
    assert "12" in said and "5" in said
    with pytest.raises(SystemExit):
        main(["data", "prepare", str(root), "--task", "imagenet_color"])
    assert "nothing to prepare" in capsys.readouterr().err


def test_odd_photos_are_read_or_named(tmp_path: Path, own_cache: Path) -> None:
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
        np.testing.assert_array_equal(read[name], np.asarray(frames[0]))  # the first picture
    lines, ok = check_data("imagenet_color", str(folder))
    text = json.dumps(lines)
    assert not ok and "val/text.jpg cannot be read as an image" in text and "tiny.png: only (30, 9) pixels" in text
