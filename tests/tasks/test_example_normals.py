"""The task of surface normals in examples/: files, flips, loss and metric, and a run on synthetic rooms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import torch

from examples.surface_normals.surface_normals import (
    AngularError,
    Config,
    SurfaceNormals,
    angle,
    axis_matrix,
    read_normals,
    unit,
)
from tests.support.paths import ROOT
from tests.support.small import DIRECT, LM, ORACLE
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.tiles import Tile
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.reports.data_page import UNLABELED, label_picture
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.run import train

PLUGIN = "examples.surface_normals.surface_normals"
SECTION = {"task": {"name": "surface_normals"}, "plugins": [PLUGIN]}
SHORT = ("train.steps=2", "optim.warmup_steps=1")
TASK = SurfaceNormals(Config())
OURS = axis_matrix(("right", "up", "back"))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests that change it copy it."""
    root = tmp_path_factory.mktemp("normals") / "rooms"
    write_dataset("normals", root, 10, (24, 32), num_val=4, workers=1)
    return root


def sample_of(normals: np.ndarray) -> Sample:
    normals = np.asarray(normals, np.float32)
    return Sample("x", np.zeros((*normals.shape[:2], 3), np.uint8), {"normals": normals})


def tilted(degrees: float, axis: int = 0) -> list[float]:
    """The direction to the camera, turned towards another axis."""
    vector = [0.0, 0.0, math.cos(math.radians(degrees))]
    vector[axis] = math.sin(math.radians(degrees))
    return vector


def score(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    metric = AngularError()
    metric.update(np.asarray(prediction, np.float32), sample_of(truth))
    return metric.compute()


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("crop", ["none", "inception"])
def test_a_flip_mirrors_the_normals_and_labels_stay_unit_vectors(crop: Literal["none", "inception"]) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:] = 255
    normals = np.where(image[..., :1] == 0, [0.6, 0.0, 0.8], [0.0, 0.6, 0.8]).astype(np.float32)
    transform = JointTransform(DataConfig(image_size=16, crop=crop, hflip=True), TASK, train=True)
    seen = set()
    for seed in range(16):
        picture, labels, _ = transform(Sample("x", image, {"normals": normals}), seed)
        found = labels["normals"]
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
        dark, bright = picture[0] == 0, picture[0] == 255
        if not (dark.any() and bright.any()):
            continue
        mirrored = bool(bright[8].argmax() < dark[8].argmax())
        assert np.allclose(found[dark], [-0.6 if mirrored else 0.6, 0, 0.8])
        assert np.allclose(found[bright], [0, 0.6, 0.8])
        seen.add(mirrored)
    assert seen == {False, True} and normals[0, 0, 0] == np.float32(0.6)


def test_predictions_are_unit_vectors_at_every_size() -> None:
    logits = {"normals": torch.randn(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 5}
    items = TASK.decode(logits)
    large = TASK.to_size(items[0], np.zeros((20, 30, 3), np.uint8))
    tiles = [(Tile(0, left, 20, 20), items[i]) for i, left in enumerate((0, 10))]
    merged = TASK.merge_tiles(items[0], tiles, np.zeros((20, 30, 3), np.uint8))
    for normals in (items[0], large, merged):
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert TASK.spread([large, large]).max() < 1e-3 < TASK.spread([large, merged]).mean()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "npy", "alpha"])
def test_normal_maps_of_every_format_are_read_along_their_axes(kind: str, tmp_path: Path) -> None:
    """Stored as by DSINE: left, up, back. The last pixel has no normal."""
    stored = np.array([[[0, 0, 1], [0.6, 0, 0.8], [0, -0.6, 0.8], [-1, -1, -1]]], np.float64)
    file = tmp_path / ("a.npy" if kind == "npy" else "a.png")
    if kind == "npy":
        stored[0, 3] = np.nan
        np.save(file, stored)
    else:
        half = 32767.5 if kind == "16 bits" else 127.5
        pixels = (stored * half + half).round().astype(np.uint16 if kind == "16 bits" else np.uint8)[..., ::-1]
        if kind == "alpha":
            pixels[0, 3] = pixels[0, 0]
            pixels = np.concatenate([pixels, np.array([[[255], [255], [255], [0]]], np.uint8)], axis=-1)
        cv2.imwrite(str(file), pixels)
    normals = read_normals(file, axis_matrix(("left", "up", "back")))
    assert normals.dtype == np.float32 and not normals[0, 3].any()
    expected = [[0, 0, 1], [-0.6, 0, 0.8], [0, -0.6, 0.8]]
    np.testing.assert_allclose(normals[0, :3], expected, atol=8e-3 if kind in ("8 bits", "alpha") else 1e-4)
    np.testing.assert_allclose(np.linalg.norm(normals[0, :3], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"no picture", "not a PNG with three channels"),
        ("a.npy", b"no array", "cannot be read as a normal map"),
        ("a.png", None, "no such file; each image needs its normal map"),
    ],
)
def test_unreadable_normal_maps_are_named_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}") as caught:
        read_normals(tmp_path / name, OURS)
    assert "\n" not in str(caught.value)


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 5), np.float32))
    with pytest.raises(UserError, match=r"shape \(3, 4, 5\), expected \(H, W, 3\)"):
        read_normals(tmp_path / "a.npy", OURS)


@pytest.mark.parametrize("axes", [("right", "up"), ("right", "left", "up"), ("right", "up", "north")])
def test_axes_that_do_not_span_space_are_refused(axes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"task.axes=.*three of right, left"):
        SurfaceNormals(Config(axes=axes))


def test_data_check_runs_the_contract_and_reads_the_rooms(rooms: Path) -> None:
    lines, ok = check_data("surface_normals", str(rooms), [f"plugins=[{PLUGIN}]"])
    assert ok and lines[0] == "task surface_normals: a sample passes through all of its methods"


def test_data_check_reports_normals_that_point_away(rooms: Path) -> None:
    lines, ok = check_data("surface_normals", str(rooms), [f"plugins=[{PLUGIN}]", "task.axes=[right,down,front]"])
    assert not ok and any("point away from the camera; set task.axes" in line for line in lines)


@pytest.mark.parametrize("suffix", ["_img", ""])
def test_images_and_normal_maps_may_share_a_folder(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    cv2.imwrite(str(tmp_path / f"val/1{suffix}.png"), np.zeros((4, 4, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "val/1_normal.png"), np.full((4, 4, 3), 200, np.uint8))
    folders = Config(image_dir="", normal_dir="", image_suffix=suffix, normal_suffix="_normal")
    source = SurfaceNormals(folders).source(str(tmp_path), "val")
    assert len(source) == 1 and source[0].id == "1" and source[0].maps["normals"].all()
    (tmp_path / "val/1_normal.png").unlink()
    with pytest.raises(UserError, match="1 have no normal map, the first is 1"):
        SurfaceNormals(folders).source(str(tmp_path), "val")


# ---------------------------------------------------------------- loss and metric


def test_the_loss_is_the_negative_logarithm_of_a_density() -> None:
    """Its integral over the sphere is 1: from evenly spread points."""
    count = 4000
    height = 1 - (2 * torch.arange(count, dtype=torch.float64) + 1) / count
    turn, ring = torch.arange(count) * math.pi * (3 - 5**0.5), (1 - height**2).sqrt()
    normals = torch.stack([ring * turn.cos(), ring * turn.sin(), height], -1).float()[:, None]
    for v in ([0.0, 0.0, 0.0], [0.3, 0.0, -0.4], [3.0, 4.0, 0.0], [0.0, -30.0, 0.0]):
        logits = torch.tensor(v).expand(count, 1, 3)
        loss, _ = TASK.loss({"normals": logits}, {"normals": normals})
        assert float((-loss).exp().mean() * 4 * math.pi) == pytest.approx(1, abs=2e-3)
    far, _ = TASK.loss({"normals": torch.tensor([[[0.0, 0.0, 1e4]]])}, {"normals": torch.tensor([[[0.0, 0.0, -1.0]]])})
    assert float(far) == pytest.approx(2e4, rel=1e-2)


def test_pixels_without_a_normal_have_no_loss_and_no_gradient() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss, _ = TASK.loss({"normals": logits}, {"normals": torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])})
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(math.log(4 * math.pi) / 2, abs=1e-3)
    assert logits.grad is not None and logits.grad[0].tolist() == [[0, 0, -0.5], [0, 0, 0]]


def test_a_perfect_prediction_has_no_error(rooms: Path) -> None:
    source = TASK.source(str(rooms), "val")
    metric = AngularError()
    for i in range(len(source)):
        row = metric.update(source[i].maps["normals"], source[i])
        assert row["mean_angle"] < 1e-6 and row["median_angle"] < 1e-6
    figures = metric.compute()
    assert figures["mean_angle"] < 1e-6 and figures["median_angle"] == 0
    assert figures["below_11.25"] == figures["below_30"] == 100 and figures["images"] == 4


def test_the_rounding_of_float32_is_no_error() -> None:
    truth = unit(np.random.default_rng(0).standard_normal((50, 50, 3)))
    assert score(truth * np.float32(1.7), truth)["median_angle"] == 0


def test_angles_equal_values_computed_by_hand() -> None:
    prediction = np.array([[tilted(0), tilted(90), tilted(10), tilted(25, 1), [0, 1, 0]]])
    truth = np.array([[[0, 0, 1]] * 4 + [[0, 0, 0]]])
    metric = AngularError()
    row = metric.update(prediction, sample_of(truth))
    figures = metric.compute()
    shares = {"below_11.25": 50.0, "below_22.5": 50.0, "below_30": 75.0}
    assert row == pytest.approx({"mean_angle": 31.25, "median_angle": 17.5, **shares, "valid_pixels": 4}, abs=1e-4)
    assert figures["mean_angle"] == pytest.approx(31.25, abs=1e-4)
    assert figures["median_angle"] == pytest.approx(17.5, abs=1 / 40)
    assert {name: figures[name] for name in shares} == shares
    assert angle([0, 0, 1], [0, 0, -1]) == 180 and angle(tilted(0.001), [0, 0, 1]) == pytest.approx(0.001, rel=1e-6)


def test_states_of_processes_add_up_to_that_of_all_images() -> None:
    random = np.random.default_rng(0)
    maps = [unit(random.standard_normal((2, size, size + 1, 3))) for size in (4, 5, 7)]
    whole, parts = AngularError(), [AngularError() for _ in maps]
    for part, (prediction, truth) in zip(parts, maps, strict=True):
        for metric in (whole, part):
            metric.update(prediction, sample_of(truth))
    states = [part.state() for part in parts]
    parts[0].load_state({name: np.sum([state[name] for state in states], axis=0) for name in states[0]})
    assert parts[0].compute() == pytest.approx(whole.compute())
    errors = np.concatenate([angle(*pair).ravel() for pair in maps])
    assert whole.compute()["mean_angle"] == pytest.approx(errors.mean(), abs=1e-4)
    assert whole.compute()["median_angle"] == pytest.approx(np.median(errors), abs=1 / 40)


def test_a_prediction_without_a_direction_is_off_by_90_degrees() -> None:
    truth = np.array([[[0, 0, 1], [0, 0, 1]]])
    assert score(np.array([[[0, 0, 0], [np.nan, 0, 0]]]), truth)["mean_angle"] == 90


def test_images_without_normals_are_counted_and_alone_refused() -> None:
    metric = AngularError()
    assert metric.update(np.zeros((2, 2, 3)), sample_of(np.zeros((2, 2, 3)))) == {"valid_pixels": 0}
    with pytest.raises(UserError, match="no pixel with a normal was evaluated, in 1 images"):
        metric.compute()
    metric.update(np.ones((2, 2, 3)), sample_of(np.ones((2, 2, 3))))
    assert metric.compute()["images_without_normals"] == 1


# ---------------------------------------------------------------- pictures and runs


def test_pixels_without_a_normal_are_gray_and_the_legend_names_the_colors() -> None:
    labels = np.zeros((4, 4, 3), np.float32)
    labels[:, :2] = [0, 0, 1]
    picture = label_picture(TASK, np.zeros((4, 4, 3), np.uint8), {"normals": labels})
    assert (picture[:, 2:] == UNLABELED).all() and (picture[:, :2] == (128, 128, 255)).all()
    legend = TASK.legend()
    assert legend.dtype == np.uint8 and (legend[54, 54] == (128, 128, 255)).all()


def test_predictions_are_saved_along_the_axes_of_the_files(tmp_path: Path) -> None:
    axes = ("down", "back", "left")
    task, prediction = SurfaceNormals(Config(axes=axes)), unit(np.random.default_rng(0).standard_normal((5, 6, 3)))
    paths = task.save_prediction(prediction, np.zeros((5, 6, 3), np.uint8), str(tmp_path / "a"))
    assert paths == task.prediction_files(str(tmp_path / "a"))
    assert np.allclose(np.load(paths["npy"])[..., 0], -prediction[..., 1])
    for kind, tolerance in (("npy", 1e-4), ("png", 0.4)):
        assert angle(read_normals(Path(paths[kind]), axis_matrix(axes)), prediction).max() < tolerance


@pytest.mark.slow
def test_plugin_from_configuration_to_prediction(rooms: Path, tmp_path: Path) -> None:
    oracle, lm, direct = (tmp_path / name for name in ("oracle", "lm", "direct"))
    train(resolve(load_run({**ORACLE, **SECTION}, [f"train.out={oracle}", f"data.root={rooms}", *SHORT])))
    train(resolve(load_run(LM, [f"train.out={lm}", f"oracle={oracle}", *SHORT])))
    train(resolve(load_run({**DIRECT, **SECTION}, [f"train.out={direct}", f"data.root={rooms}", *SHORT])))
    result = evaluate(lm, baseline=True, compare=direct)
    assert result["protocol"] == "surface_normals/eigen_fergus" and result["images"] == 4
    assert set(result["figures"]) == {"baseline", "oracle", "context_only", "lm", "direct"}
    assert 5 < result["figures"]["baseline"]["mean_angle"] < 60
    assert {"lm", "direct"} <= {pair["first"] for pair in result["intervals"]}
    written = predict_files(lm, [str(rooms / "val/images/000000.jpg")], tmp_path / "out")
    assert np.load(written[0]["npy"]).shape == (24, 32, 3) and Path(written[0]["png"]).is_file()


@pytest.mark.parametrize("stage", ["oracle", "lm", "direct"])
def test_the_examples_configurations_are_valid(stage: str) -> None:
    run = load_run(ROOT / f"examples/surface_normals/{stage}.yaml")
    assert run.train.steps and run.stage == stage
