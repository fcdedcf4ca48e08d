"""Mistakes in a task from outside the package, each found by `data check` and before training, in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.camvid_segmentation.camvid_segmentation import CamvidSegmentation, Config, MeanIoU
from tests.support.camvid import PLUGIN, camvid_data
from tests.support.small import ORACLE
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.base import Categorical, Real
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.contract import contract_faults, refuse_faults
from uvim_fsq.tasks.registry import BUILT_IN, task_class
from uvim_fsq.training.run import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return camvid_data(tmp_path_factory.mktemp("camvid") / "set")


def faults(root: Path, **changes: Any) -> list[str]:
    return contract_faults(type("Mine", (CamvidSegmentation,), changes)(Config()), str(root))


def metric(**changes: Any) -> Any:
    return lambda self, source: type("Metric", (MeanIoU,), changes)()


def encode(change: Any) -> Any:
    return lambda self, sample: change(CamvidSegmentation.encode(self, sample))


def loss(change: Any) -> Any:
    return lambda self, logits, labels: change(*CamvidSegmentation.loss(self, logits, labels))


def summed(self: Any, logits: Any, labels: Any) -> Any:
    values, logs = CamvidSegmentation.loss(self, logits, labels)
    return values * labels["classes"].shape[1], logs


class BadPhotos:
    """A source with a single, faulty sample."""

    def __init__(self, **change: Any) -> None:
        good = {"id": "x", "image": np.zeros((24, 32, 3), np.uint8), "maps": {"classes": np.zeros((24, 32), np.int32)}}
        self.info, self.parts = {}, good | change

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample(**self.parts)


def source(**change: Any) -> Any:
    return lambda self, root, split: BadPhotos(**change)


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("main metric", {"main_metric": "mIoU"}, "metric: compute returns miou, .* but not 'mIoU'"),
    ("secondary_metrics", {"secondary_metrics": ("accuracy",)}, "metric: compute returns .* but not 'accuracy'"),
    ("no channels", {"label_channels": {}}, "label_channels: expected a non-empty dict of channels, got dict"),
    ("odd channel", {"label_channels": {"classes": 11}}, "label_channels: channel 'classes' is int, expected Categor"),
    ("no class", {"label_channels": {"classes": Categorical(0)}}, "channel 'classes' has 0 classes"),
    (
        "channel's name",
        {"encode": encode(lambda x: {"class": x["classes"]})},
        r"encode: the channels are \['class'\], but label",
    ),
    (
        "no dict",
        {"encode": encode(lambda x: x["classes"])},
        r"encode: the channels are int16 \(32, 32\), but label_channels",
    ),
    (
        "dtype",
        {"encode": encode(lambda x: {"classes": x["classes"].astype(np.float32)})},
        r"encode: channel 'classes' is float32 \(32, 32\), expected integers \(32, 32\)",
    ),
    (
        "shape",
        {"encode": encode(lambda x: {"classes": x["classes"][..., None]})},
        r"is int16 \(32, 32, 1\), exp",
    ),
    ("tensor", {"encode": encode(lambda x: {"classes": torch.zeros(32, 32)})}, "expected a NumPy array"),
    ("range", {"encode": encode(lambda x: {"classes": x["classes"] + 20})}, r"holds values from .* expected -1\.\.10"),
    (
        "below",
        {"encode": encode(lambda x: {"classes": x["classes"] * 0 - 2 * np.eye(32, dtype=int)})},
        "from -2 to 0, exp",
    ),
    (
        "real range",
        {"label_channels": {"x": Real(1)}, "encode": lambda *_: {"x": np.full((32, 32, 1), 1.5, np.float32)}},
        r"channel 'x' holds values from 1.5 to 1.5, expected -1\.\.1",
    ),
    (
        "real below",
        {"label_channels": {"x": Real(1)}, "encode": lambda *_: {"x": np.eye(32, dtype=np.float32)[..., None] * -1.5}},
        r"channel 'x' holds values from -1.5 to -0.0, expected -1\.\.1",
    ),
    (
        "real shape",
        {"label_channels": {"x": Real(2)}, "encode": lambda *_: {"x": np.zeros((32, 32, 1), np.float32)}},
        r"channel 'x' is float32 \(32, 32, 1\), expected float32 or uint8 \(32, 32, 2\)",
    ),
    (
        "real nan",
        {"label_channels": {"x": Real(1)}, "encode": lambda *_: {"x": np.full((32, 32, 1), np.nan, np.float32)}},
        "channel 'x' holds values from nan to nan",
    ),
    (
        "exception",
        {"encode": lambda self, sample: {}["classes"]},
        r"encode fails: KeyError: .classes. \(.*test_contract",
    ),
    (
        "scalar loss",
        {"loss": loss(lambda x, logs: (x.mean(), logs))},
        r"loss: the loss of 2 images is float32 \(\)",
    ),
    ("no logs", {"loss": loss(lambda x, logs: x)}, r"loss: expected \(loss, logs\), got float32 \(2,\)"),
    (
        "scalar log",
        {"loss": loss(lambda x, logs: (x, {"a": x.mean()}))},
        r"log 'a' of 2 images is float32 \(\)",
    ),
    ("nan loss", {"loss": loss(lambda x, logs: (x * float("nan"), logs))}, "the loss is .* for random logits"),
    ("sum", {"loss": summed}, "the loss is not a mean over pixels"),
    ("no gradient", {"loss": loss(lambda x, logs: (x.detach(), logs))}, "the loss has no gradient"),
    (
        "scalar image loss",
        {"image_loss": lambda self, logits, labels: (logits["classes"].mean(), {})},
        r"image_loss: the loss of 2 images is float32 \(\)",
    ),
    (
        "image loss without gradient",
        {"image_loss": lambda self, logits, labels: (logits["classes"].detach().mean((1, 2, 3)), {})},
        "image_loss: the loss has no gradient",
    ),
    (
        "image loss of other shapes",
        {"image_loss": lambda self, logits, labels: logits["classes"][:, :, 99999]},
        "image_loss fails: IndexError",
    ),
    (
        "decode",
        {"decode": lambda self, logits: logits["classes"].argmax(-1)},
        r"decode: expected a list of one item .* int64",
    ),
    ("one item", {"decode": lambda self, logits: [1]}, "decode: expected a list of one item per image, got list"),
    ("logits", {"decode": lambda self, logits: list(logits["x"])}, r"decode fails: KeyError: 'x' \(.*test_contract"),
    ("no row", {"metric": metric(update=lambda *_: None)}, "metric: update must return .* not NoneType"),
    ("row", {"metric": metric(update=lambda *_: {"a": "b"})}, "metric: update must return .* not dict"),
    ("state", {"metric": metric(state=lambda self: [1])}, "metric: state must return name -> NumPy array"),
    ("compute", {"metric": metric(compute=lambda self: 3.0)}, "metric: compute must return name -> float, not float"),
    (
        "load_state",
        {"metric": metric(load_state=lambda self, state: setattr(self, "confusion", np.eye(11)))},
        r"load_state\(state\(\)\) changes what compute returns",
    ),
    ("to_size", {"to_size": lambda *_: 1 / 0}, "to_size fails: ZeroDivisionError"),
    ("render", {"render": lambda *_: {"picture": 0}}, 'render: expected a dict with the title "prediction"'),
    (
        "with truth",
        {"render": lambda self, i, p, t=None: {"prediction": i} if t is None else {}},
        "render: expected a dict with",
    ),
    (
        "alone",
        {"render": lambda self, i, p, t=None: {} if t is None else {"prediction": i}},
        "render: expected a dict with",
    ),
    (
        "picture",
        {"render": lambda self, image, *_: {"prediction": image / 255}},
        r"render: picture 'prediction' is float64 \(24, 32, 3\), expected uint8 \(24, 32, 3\)",
    ),
    (
        "save",
        {"save_prediction": lambda *_: {"png": "nowhere.png"}},
        "save_prediction: expected a dict kind -> path of a written file",
    ),
    ("sample", {"source": lambda *_: [1]}, "source: expected a Sample, got int"),
    (
        "image",
        {"source": source(image=np.zeros((24, 32, 3)))},
        r"the image of a sample is float64 \(24, 32, 3\)",
    ),
    (
        "gray",
        {"source": source(image=np.zeros((24, 32), np.uint8))},
        r"the image of a sample is uint8 \(24, 32\)",
    ),
    (
        "map",
        {"source": source(maps={"classes": np.zeros((4, 4), np.int32)})},
        r"map 'classes' is int32 \(4, 4\)",
    ),
    (
        "long",
        {"source": source(maps={"classes": np.zeros((24, 32), int)})},
        r"is int64 \(24, 32\), expected int32 or",
    ),
    ("linear", {"linear_maps": ("rgb",)}, r"linear_maps lists 'rgb', but a sample has the maps \['classes'\]"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_a_fault_is_one_line(photos: Path, changes: dict[str, Any], message: str) -> None:
    found = faults(photos, **changes)
    assert found and all("\n" not in line and line.startswith("task camvid_segmentation, ") for line in found)
    assert re.search(message, found[0]), found


def test_all_faults_are_found_and_the_first_is_reported(photos: Path) -> None:
    changes = {"main_metric": "mIoU", "render": lambda *_: {}, "to_size": CamvidSegmentation.to_size}
    assert [line.split(":")[0] for line in faults(photos, **changes)] == [
        "task camvid_segmentation, metric",
        "task camvid_segmentation, render",
        "task camvid_segmentation, save_prediction",
    ]
    one, two = (type("Mine", (CamvidSegmentation,), some)(Config()) for some in ({"main_metric": "mIoU"}, changes))
    with pytest.raises(UserError, match="not 'mIoU' .main_metric, secondary_metrics.$"):
        refuse_faults(one, str(photos), "val")
    with pytest.raises(UserError, match="not 'mIoU' .*; `uvim-fsq data check` lists 2 more$"):
        refuse_faults(two, str(photos), "val")


def test_the_result_of_a_faulty_decode_is_not_used_further(photos: Path) -> None:
    (one,) = faults(photos, decode=lambda self, logits: logits["classes"].argmax(-1))
    assert "decode: expected a list of one item per image" in one


def test_a_sample_that_cannot_be_read_is_no_fault_of_the_code(photos: Path) -> None:
    class Unreadable(BadPhotos):
        def __init__(self, readable: int) -> None:
            super().__init__()
            self.readable = readable

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Sample:
            if index == self.readable:
                return super().__getitem__(0)
            raise UserError("torn") if index < 3 else IndexError(index)

    assert faults(photos, source=lambda *_: Unreadable(5)) == []
    assert "KeyError" in faults(photos, source=lambda *_: Unreadable(2), encode=lambda *_: {}["x"])[0]


def test_a_sound_task_has_no_faults(photos: Path) -> None:
    assert faults(photos) == []
    lines, ok = check_data("camvid_segmentation", str(photos), [f"plugins=[{PLUGIN}]"])
    assert ok and lines[0] == "task camvid_segmentation: a sample passes through all of its methods"


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_the_built_in_tasks_have_no_faults(name: str, tmp_path: Path) -> None:
    cls = task_class(name)
    assert cls.synthetic is not None
    write_dataset(cls.synthetic, tmp_path / "set", 3, (24, 32), num_val=2, workers=1)
    assert contract_faults(cls(cls.resolve_config(cls.Config(), str(tmp_path / "set"))), str(tmp_path / "set")) == []


def test_training_refuses_a_fault_and_data_check_lists_it(photos: Path, tmp_path: Path) -> None:
    section = {"task": {"name": "camvid_segmentation"}, "plugins": [PLUGIN]}
    run = resolve(load_run({**ORACLE, **section}, [f"train.out={tmp_path / 'run'}", f"data.root={photos}"]))
    before = CamvidSegmentation.main_metric, CamvidSegmentation.secondary_metrics
    CamvidSegmentation.main_metric, CamvidSegmentation.secondary_metrics = "mIoU", ("no_such",)
    try:
        with pytest.raises(UserError, match="not 'mIoU'"):
            train(run)
        lines, ok = check_data("camvid_segmentation", str(photos), [f"plugins=[{PLUGIN}]"])
    finally:
        CamvidSegmentation.main_metric, CamvidSegmentation.secondary_metrics = before
    assert not ok and len(lines) == 1 and "not 'mIoU'" in lines[0] and not (tmp_path / "run").exists()
