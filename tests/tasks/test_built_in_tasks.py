"""Contracts that every built-in task keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.small import TASK_OPTIONS
from uvim_fsq.config.parse import describe_keys
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.base import Categorical, Task
from uvim_fsq.tasks.registry import BUILT_IN, task_class


@pytest.fixture(scope="module", params=sorted(BUILT_IN))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    root = tmp_path_factory.mktemp(request.param) / "data"
    cls = task_class(request.param)
    assert cls.synthetic is not None, "built-in tasks have synthetic data"
    write_dataset(cls.synthetic, root, 12, (24, 32), num_val=2, workers=1)
    return cls(cls.resolve_config(cls.Config(**TASK_OPTIONS.get(request.param, {})), str(root))), root


def batch_of(task: Task, root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Labels (2, 16, 16[, C]) and random logits (2, 16, 16, C) of two validation samples."""
    source = task.source(str(root), "val")
    batches = eval_batches(source, task, DataConfig(image_size=16), batch_size=2, workers=0)
    labels = to_device(next(batches)[0], torch.device("cpu"))["labels"]
    g = torch.Generator().manual_seed(0)
    logits = {}
    for name, channel in task.label_channels.items():
        size = channel.num_classes if isinstance(channel, Categorical) else channel.channels
        logits[name] = torch.randn(2, 16, 16, size, generator=g)
        assert labels[name].shape[:3] == (2, 16, 16)
        if isinstance(channel, Categorical):
            assert labels[name].dtype in (torch.uint8, torch.int8, torch.int16)
            assert int(labels[name].min()) >= -1 and int(labels[name].max()) < channel.num_classes
        else:
            assert labels[name].dtype == torch.float32 and float(labels[name].abs().max()) <= 1
    return labels, logits


def test_loss_is_a_mean_over_pixels(case: tuple[Task, Path]) -> None:
    task, root = case
    labels, logits = batch_of(task, root)
    flat = [{name: x.flatten(1, 2) for name, x in tree.items()} for tree in (logits, labels)]
    whole, logs = task.loss(*flat)
    assert whole.shape == (2,) and bool(torch.isfinite(whole).all()) and all(x.shape == (2,) for x in logs.values())
    parts = [
        task.loss(*({n: x[:, half] for n, x in tree.items()} for tree in flat))[0]
        for half in np.split(np.arange(256), 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, atol=1e-5, rtol=1e-5)


def test_decoding_metrics_rendering_and_saving(case: tuple[Task, Path], tmp_path: Path) -> None:
    task, root = case
    _, logits = batch_of(task, root)
    items = task.decode(logits)
    source = task.source(str(root), "val")
    samples = [task.evaluation_view(source[i]) for i in range(2)]
    both, parts = task.metric(source), [task.metric(source), task.metric(source)]
    for i in range(2):
        row = both.update(items[i], samples[i])
        parts[i].update(items[i], samples[i])
        assert all(isinstance(value, float) for value in row.values())
    merged = task.metric(source)
    merged.load_state({k: v + parts[1].state()[k] for k, v in parts[0].state().items()})
    assert merged.compute() == pytest.approx(both.compute())
    assert task.main_metric in both.compute()
    image = samples[0].image
    item = task.to_size(items[0], image)
    pictures = task.render(image, item, samples[0])
    assert pictures and all(p.dtype == np.uint8 and p.shape == image.shape for p in pictures.values())
    assert all(Path(path).is_file() for path in task.save_prediction(item, image, str(tmp_path / "x")).values())
    baseline = task.baseline(task.source(str(root), "train"), 16)
    if baseline is not None:
        small = task.model_image(Sample("", resize_linear(image, (16, 16))))
        assert baseline.name and task.metric(source).update(baseline.predict(small), samples[0])


def test_settings_are_documented(case: tuple[Task, Path]) -> None:
    assert all(doc for *_, doc in describe_keys(type(case[0]).Config))
