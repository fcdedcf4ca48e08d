"""The NYU adapters read what the writers of the real formats wrote; every broken file gets one clear line."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.support.small import small_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.synthetic.render import render
from uvim_fsq.tasks.nyu_depth.data import open_source, prepare
from uvim_fsq.tasks.nyu_depth.files import read_depth_file
from uvim_fsq.tasks.nyu_depth.metrics import FIGURES, DepthMetric
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


@pytest.mark.parametrize(("layout", "letter"), [("h5", "B"), ("mat", "A"), ("png", "C")])
def test_layouts_are_found_by_content(tmp_path: Path, layout: str, letter: str) -> None:
    root = small_data(tmp_path / "data", num=25, num_val=3, layout=layout)
    train, val = (open_source(str(root), split, CONFIG) for split in ("train", "val"))
    assert train.info["layout"] == letter and (len(train), len(val)) == (25, 3)
    assert val.info["official_count"] == 654 and train.info["ground_truth"] in ("raw", "filled")
    sample = pickle.loads(pickle.dumps(train))[0]
    assert sample.image.shape == (24, 32, 3) and sample.image.dtype == np.uint8
    assert sample.maps["depth"].shape == (24, 32) and sample.maps["depth"].dtype == np.float32
    depths = [render(0, i, (24, 32)).depth for i in range(25)]
    error = min(float(np.abs(d - sample.maps["depth"])[sample.maps["depth"] > 0].max()) for d in depths)
    assert error <= 0.0011  # millimetres, cut off, in the PNG tree
    holdout, rest = (open_source(str(root), split, CONFIG) for split in ("holdout", "train_minus_holdout"))
    ids = [{source[i].id for i in range(len(source))} for source in (holdout, rest, train)]
    assert ids[0] and ids[0] | ids[1] == ids[2] and not ids[0] & ids[1]
    lines, ok = check_data("nyu_depth", str(root))
    assert ok and f"layout {letter}" in lines[0] and any("DIFFERS" in line for line in lines)


def test_own_folder(tmp_path: Path) -> None:
    for kind in ("images", "depth"):
        (tmp_path / kind).mkdir()
    depth = np.linspace(0.5, 9, 12 * 8).reshape(8, 12).astype(np.float32)
    for i in range(11):
        Image.fromarray(np.full((8, 12, 3), i, np.uint8)).save(tmp_path / "images" / f"{i:02d}.jpg")
    for i in range(10):
        np.save(tmp_path / "depth" / f"{i:02d}.npy", depth * 100)
    config = NYUDepthConfig(protocol="full", depth_scale=100)
    with pytest.raises(UserError, match="1 images have no depth map, the first is 10"):
        open_source(str(tmp_path), "train", config)
    np.save(tmp_path / "depth" / "10.npy", depth * 100)
    train, val = (open_source(str(tmp_path), split, config) for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 2)
    np.testing.assert_allclose(train[0].maps["depth"], depth, rtol=1e-6)
    parts = [open_source(str(tmp_path), split, config) for split in ("val", "holdout", "train_minus_holdout")]
    ids = [source[i].id for source in parts for i in range(len(source))]
    assert len(parts[1]) == 1 and len(ids) == len(set(ids)) == 11, "nothing is held out of the evaluation split"


def test_depth_files(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide.png", tmp_path / "narrow.png"
    Image.fromarray(np.array([[0, 1500], [9999, 2000]], np.uint16)).save(wide)
    Image.fromarray(np.array([[0, 51], [255, 102]], np.uint8)).save(narrow)
    np.testing.assert_allclose(read_depth_file(wide), [[0, 1.5], [9.999, 2]], rtol=1e-6)
    np.testing.assert_allclose(read_depth_file(narrow), [[0, 2], [10, 4]], rtol=1e-6)
    odd = tmp_path / "odd.npy"
    np.save(odd, np.array([[np.nan, -1.0], [np.inf, 2.0]]))
    np.testing.assert_array_equal(read_depth_file(odd), [[0, 0], [0, 2]])
    np.save(odd, np.full((2, 2), 2000.0))
    with pytest.raises(UserError, match="scale"):
        read_depth_file(odd)
    # The median decides, however it is found: two equal halves have the mean of their inner ends.
    fit = ([0.01, 0.05, 3000], [0, 0, 0, 99, 99.5], [0.001, 0.05], [0, 0])
    for values in (*fit, [0.01, 0.01, 3], [1, 1, 500, 500]):
        np.save(odd, np.array([values]))
        if values in fit:
            np.testing.assert_array_equal(read_depth_file(odd), np.array([values], np.float32))
        else:
            with pytest.raises(UserError, match="median depth"):
                read_depth_file(odd)
    wide.write_bytes(wide.read_bytes()[:40])
    with pytest.raises(UserError, match="wide.png cannot be read"):
        read_depth_file(wide)


def test_broken_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_source(str(tmp_path / "nowhere"), "train", CONFIG)
    with pytest.raises(UserError, match="no depth data found"):
        open_source(str(tmp_path), "train", CONFIG)
    root = small_data(tmp_path / "data", num=4, num_val=2)
    source = open_source(str(root), "train", CONFIG)
    files = sorted(root.rglob("train/**/*.h5"))
    files[0].write_bytes(files[0].read_bytes()[:500])
    with h5py.File(files[1], "a") as file:
        del file["depth"]
    with pytest.raises(UserError, match=files[0].name):
        source[0]
    with pytest.raises(UserError, match="no dataset 'depth'"):
        source[1]
    lines, ok = check_data("nyu_depth", str(root))
    assert not ok and any(files[0].name in line for line in lines)
    with pytest.raises(UserError, match="unknown split"):
        open_source(str(root), "validation", CONFIG)


@pytest.mark.parametrize("own", [False, True])
def test_prepared_pictures_are_the_same(tmp_path: Path, own: bool) -> None:
    root = small_data(tmp_path / "data", num=21, num_val=2, layout="png")
    if own:  # the same files as somebody's own folder, without splits
        for kind, pattern in (("images", "rgb_*.jpg"), ("depth", "*depth_*.png")):
            (root / kind).mkdir()
            for i, file in enumerate(sorted(root.rglob(pattern))):
                file.rename(root / kind / f"{i:02d}{file.suffix}")
        for folder in ("sync", "official_splits"):
            shutil.rmtree(root / folder)
    config = NYUDepthConfig(protocol="full", depth_scale=500.0 if own else None)
    splits = ("train", "val", "holdout", "train_minus_holdout")
    before = [open_source(str(root), split, config) for split in splits]
    seen: list[tuple[int, int]] = []
    assert prepare(str(root), config, lambda done, total: seen.append((done, total))).startswith("23 images")
    assert (23, 23) in seen and not list(root.rglob("*.partial"))
    for split, source in zip(splits, before, strict=True):
        after = open_source(str(root), split, config)
        assert len(after) == len(source) > 0 and after.info["layout"].endswith("(prepared)")
        assert {file.suffix for _, *files in after.pairs for file in files} == {".h5"}
        for i in range(len(source)):
            assert after[i].id == source[i].id
            np.testing.assert_array_equal(after[i].image, source[i].image)
            np.testing.assert_array_equal(after[i].maps["depth"], source[i].maps["depth"])
    assert prepare(str(root), config, lambda done, total: None).startswith("all 23 images are in")
    scale = f"task.depth_scale={config.depth_scale or 'null'}"
    assert "(prepared)" in check_data("nyu_depth", str(root), ["task.protocol=full", scale])[0][0]


def test_prepared_pictures_of_changed_files_are_not_used(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=6, num_val=1, layout="png")
    prepare(str(root), CONFIG, lambda done, total: None)
    pngs = sorted(root.glob("sync/**/*.png"))
    with Image.open(pngs[2]) as image:
        depth = np.asarray(image) // 2 + 1
    Image.fromarray(depth.astype(np.uint16)).save(pngs[2])
    pngs[4].write_bytes(b"broken")
    source = open_source(str(root), "train", CONFIG)
    assert source.info["layout"] == "C (4 of 6 prepared)"
    np.testing.assert_allclose(source[2].maps["depth"], depth / 1000, rtol=1e-6)
    said = prepare(str(root), CONFIG, lambda done, total: None)
    assert said.startswith("1 images") and "1 were skipped, the first: " in said and pngs[4].name in said
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (5 of 6 prepared)"
    other = NYUDepthConfig(protocol="full", depth_scale=500.0)
    assert open_source(str(root), "train", other).info["layout"] == "C (5 of 6 prepared)"  # of own data only
    shutil.rmtree(root / "official_splits")
    for file in root.glob("*test_files*.txt"):
        file.unlink()
    said = prepare(str(root), CONFIG, lambda done, total: None)
    assert said.startswith("0 images") and "; val was skipped: " in said and "holds no rgb" in said


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_data(tmp_path / "data", num=6, num_val=1, layout="png")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(root), CONFIG, stop)
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (4 of 6 prepared)"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(UserError, match="has 0.00 GB free, but 0.00 GB are needed"):
        prepare(str(root), CONFIG, lambda done, total: None)
    monkeypatch.undo()
    assert prepare(str(root), CONFIG, lambda done, total: None).startswith("3 images")
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (prepared)"


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=3, num_val=1, layout="png")
    prepare(str(root), CONFIG, lambda done, total: None)
    for file in (root / "prepared_depth").rglob("*.h5"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="rgb_.*h5 cannot be read .* delete .*prepared_depth and"):
        open_source(str(root), "val", CONFIG)[0]
    (root / "prepared_depth" / "contents.json").write_text("{")
    with pytest.raises(UserError, match=r"contents.json is damaged .*; delete .*prepared_depth"):
        open_source(str(root), "val", CONFIG)
    with pytest.raises(UserError, match="HDF5 already .layout B.*nothing to prepare"):
        prepare(str(small_data(tmp_path / "h5", num=2, num_val=1)), CONFIG, lambda done, total: None)
    for folder in ("photos", "mine/depth"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    np.save(tmp_path / "mine" / "depth" / "a.npy", np.ones((8, 12), np.float32))
    for place in ("../photos", str(tmp_path / "photos")):
        with pytest.raises(UserError, match="a.png is outside of .*mine; only data inside"):
            outside = NYUDepthConfig(protocol="full", image_dir=place)
            prepare(str(tmp_path / "mine"), outside, lambda done, total: None)


def sample_of(depth: np.ndarray) -> Sample:
    return Sample("x", np.zeros((*depth.shape, 3), np.uint8), {"depth": depth.astype(np.float32)})


def test_metric_by_hand() -> None:
    """Valid is what lies between the limits, not on them; a ratio of exactly 1.25 is too far; means over images."""
    metric = DepthMetric("nyu_depth/full")
    truth = np.array([[1e-3, 1.1e-3, 1.0], [4.0, 2.0, 10.0]], np.float32)
    row = metric.update(np.array([[5.0, 0.0, 1.6], [5.0, 2.0, 1.0]]), sample_of(truth))
    ratios, errors = [1.1, 1.6, 1.25, 1.0], np.array([1e-4, 0.6, 1.0, 0.0])  # 0 is brought to the least depth, 1e-3
    first = {
        "rmse": np.sqrt(np.mean(errors**2)),
        "abs_rel": (1e-4 / 1.1e-3 + 0.6 + 0.25) / 4,
        "log10": np.log10(ratios).sum() / 4,
        **{"delta1": 0.5, "delta2": 0.75, "delta3": 1.0},
    }
    assert row == pytest.approx({**first, "valid_pixels": 4}, abs=1e-6)
    flat = np.full((1, 2), 2.0)
    row = metric.update(np.array([[4.0]]), sample_of(flat))  # resized
    second = {"rmse": 2, "abs_rel": 1, "log10": np.log10(2), "delta1": 0, "delta2": 0, "delta3": 0}
    assert row == pytest.approx({**second, "valid_pixels": 2})
    assert metric.update(np.ones((2, 2)), sample_of(np.array([[0.0, 10.0], [1e-3, 11.0]]))) == {"valid_pixels": 0}
    counts = {"images": 2, "images_skipped": 1, "images_repaired": 0}
    pooled = np.sqrt((np.sum(errors**2) + 2 * 4) / 6)
    expected = {name: (first[name] + second[name]) / 2 for name in FIGURES}
    assert metric.compute() == pytest.approx({**expected, "rmse_pooled": pooled, **counts}, abs=1e-6)


def test_repaired_predictions_are_counted() -> None:
    """Infinite is the largest depth, what is no number the smallest; outside the valid pixels nobody looks."""
    metric = DepthMetric("p", 0.5, 8.0)
    truth = np.array([[0.0, 2.0, 4.0, 6.0]])
    for given, shown in (
        ([np.nan, 2, 4, 6], [2, 4, 6]),
        ([1, np.inf, -np.inf, np.nan], [8, 0.5, 0.5]),
        ([1, 9, 0, np.inf], [8, 0.5, 8]),
    ):
        row = metric.update(np.array([given]), sample_of(truth))
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean((np.array(shown) - [2, 4, 6]) ** 2)))
    figures = metric.compute()
    assert (figures["images"], figures["images_skipped"], figures["images_repaired"]) == (3, 0, 2)


def test_depth_of_several_processes() -> None:
    whole, parts = DepthMetric("p"), [DepthMetric("p"), DepthMetric("p")]
    for i in range(5):
        prediction, truth = np.random.default_rng(i).uniform(0.5, 11, (2, 3, 4 + i))
        for metric in (whole, parts[i % 2]):
            metric.update(prediction, sample_of(truth))
    state = parts[0].state()
    parts[0].update(prediction, sample_of(truth))
    merged = DepthMetric("p")
    merged.load_state({key: value + parts[1].state()[key] for key, value in state.items()})
    assert merged.compute() == pytest.approx(whole.compute()) and merged.compute()["images"] == 5
    empty = DepthMetric("p")
    empty.update(np.ones((1, 1)), sample_of(np.zeros((1, 1))))
    with pytest.raises(UserError, match=r"no image with a valid depth pixel was evaluated \(1 skipped\)"):
        empty.compute()


def test_protocol_crops() -> None:
    depth = np.arange(480 * 640, dtype=np.float32).reshape(480, 640)
    for protocol, first in (("uvim", 54), ("eigen", 45)):
        view = NYUDepth(NYUDepthConfig(protocol=protocol)).evaluation_view(sample_of(depth))
        assert view.maps["depth"].shape == (426, 560) == view.image.shape[:2]
        assert view.maps["depth"][0, 0] == first * 640 + 41
    with pytest.raises(UserError, match="task.protocol=full"):
        NYUDepth(NYUDepthConfig()).evaluation_view(sample_of(np.ones((24, 32))))


def test_bins_are_the_floor_of_the_share() -> None:
    depth = np.random.default_rng(0).uniform(-0.1, 12, (64, 64)).astype(np.float32)
    for bins, missing, kind in ((256, "bin0", "uint8"), (256, "void", "int16"), (99, "void", "int8")):
        config = NYUDepthConfig(num_bins=bins, missing=missing)
        share = (depth - config.min_depth) / (config.max_depth - config.min_depth)
        expected = np.floor(share * bins).clip(0, bins - 1).astype(np.int64)
        if missing == "void":
            expected[depth <= config.min_depth] = -1
        labels = NYUDepth(config).encode(sample_of(depth))["depth"]
        np.testing.assert_array_equal(labels, expected)
        assert labels.dtype == kind


def test_missing_depth_and_decoding() -> None:
    import torch

    depth = np.array([[0.0, 5.0]])
    assert NYUDepth(NYUDepthConfig()).encode(sample_of(depth))["depth"].tolist() == [[0, 127]]
    assert NYUDepth(NYUDepthConfig(missing="void")).encode(sample_of(depth))["depth"].tolist() == [[-1, 127]]
    logits = {"depth": torch.log(torch.tensor([[[[0.5, 0.25, 0.25, 0.0]]]]))}
    small = {"num_bins": 4, "min_depth": 0.0, "max_depth": 4.0}
    assert float(NYUDepth(NYUDepthConfig(**small)).decode(logits)[0]) == 0.5
    assert abs(float(NYUDepth(NYUDepthConfig(**small, decoding="expectation")).decode(logits)[0]) - 1.25) < 1e-6
