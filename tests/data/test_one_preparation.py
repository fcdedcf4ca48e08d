"""Training, evaluation and prediction prepare a picture in the same way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Array, Sample
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.task import NYUDepth

WHOLE = DataConfig(image_size=24, crop="none", hflip=False)


class Maps(NYUDepth):
    """Passes its maps through, some of them resampled bilinearly."""

    linear_maps = ("colors", "one", "six")

    def encode(self, sample: Sample) -> dict[str, Array]:
        return sample.maps


TASK = Maps(NYUDepthConfig(protocol="full"))


def maps_of(rng: np.random.Generator, height: int, width: int) -> dict[str, Array]:
    shape = (height, width)
    return {
        "depth": rng.random(shape, np.float32),
        "classes": rng.integers(-1, 1000, shape).astype(np.int32),
        "flow": rng.random((*shape, 2), np.float32),
        "many": rng.integers(0, 9, (*shape, 7)).astype(np.int32),
        "colors": rng.random((*shape, 3), np.float32),
        "one": rng.random((*shape, 1), np.float32),
        "six": rng.random((*shape, 6), np.float32),
    }


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99))
def test_training_without_augmentation_equals_evaluation(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    sample = Sample("a", image, maps_of(rng, height, width))
    results: list[tuple[Any, ...]] = [JointTransform(WHOLE, TASK, train=train)(sample, seed) for train in (True, False)]
    (image_a, maps_a, _), (image_b, maps_b, _) = results
    np.testing.assert_array_equal(image_a, image_b)
    assert maps_a.keys() == maps_b.keys()
    for name, values in maps_a.items():
        assert values.dtype == maps_b[name].dtype, name
        np.testing.assert_array_equal(values, maps_b[name], err_msg=name)


def test_prediction_sees_what_evaluation_sees(lm_dir: Path) -> None:
    predictor = Predictor.from_run(lm_dir)
    data = replace(predictor.run.data, workers=0)
    source = predictor.task.source(data.root, data.eval_split)
    ((batch, samples),) = eval_batches(source, predictor.task, data, batch_size=99, workers=0)
    assert len(samples) == 6
    for image, sample in zip(batch["image"].numpy(), samples, strict=True):
        np.testing.assert_array_equal(predictor.prepare(sample.image), image)
