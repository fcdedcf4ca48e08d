"""Prints how long the figures of panoptic segmentation and colorization take: python tools/time_metrics.py

PQ: milliseconds per 480 x 640 image on one core. FID: seconds for two sets of 5,000 feature vectors, and the ratio to
the matrix square root of the usual programs, on the same covariances.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg

from uvim_fsq.data.sample import Sample
from uvim_fsq.data.synthetic import render
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import Segments
from uvim_fsq.tasks.imagenet_color.fid import DIM, Moments, frechet_distance

CATEGORIES = 133


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scene(index: int) -> Segments:
    """A synthetic room, its segments with arbitrary ids and classes, as a data set has them."""
    ids = render(0, index, (480, 640)).segments.astype(np.int64)
    present = np.unique(ids[ids > 0])
    numbers = np.random.default_rng(index).integers(1, 1 << 24, present.size)
    table = np.zeros(present.max() + 1, np.int32)
    table[present] = numbers
    return Segments(table[ids], numbers, present % CATEGORIES + 1, np.zeros(present.size, bool))


def time_panoptic(images: int, repeats: int) -> None:
    truths = [scene(i) for i in range(images)]
    predictions = [Segments(np.roll(t.ids, 9, 1), t.segment_ids, t.classes, t.crowd) for t in truths]
    names = [str(i) for i in range(1, CATEGORIES + 1)]
    metric = PanopticMetric("timing", names, [i % 2 == 0 for i in range(CATEGORIES)])
    blank = np.zeros((480, 640, 3), np.uint8)
    samples = [Sample(str(i), blank, {}, {"segments": truth}) for i, truth in enumerate(truths)]

    def update() -> None:
        for prediction, sample in zip(predictions, samples, strict=True):
            metric.update(prediction, sample)

    each = seconds(update, repeats) / images * 1000
    print(
        f"PQ: {each:.2f} ms per 480 x 640 image ({images} rooms, {np.mean([len(t.classes) for t in truths]):.0f} "
        f"segments each, median of {repeats}); PQ {metric.compute()['pq']:.1f}"
    )


def time_fid(count: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    # Features of a network are positive, sparse and far from independent.
    mixing = rng.standard_normal((DIM, DIM)) * np.exp(-np.arange(DIM) / 300)[:, None]
    features = [np.maximum(rng.standard_normal((count, DIM)) @ mixing * 0.02 + 0.1 * i, 0) for i in range(2)]
    sets: list[Moments] = []

    def gather() -> None:
        sets[:] = [Moments(), Moments()]
        for one, values in zip(sets, features, strict=True):
            for start in range(0, count, 50):
                one.add(values[start : start + 50])
            one.state()

    both = seconds(gather, repeats)
    distance = seconds(lambda: frechet_distance(*sets), repeats)
    start = time.perf_counter()
    root = np.real(np.asarray(scipy.linalg.sqrtm(sets[0].covariance @ sets[1].covariance)))
    usual = time.perf_counter() - start
    traces = np.trace(sets[0].covariance) + np.trace(sets[1].covariance) - 2 * np.trace(root)
    expected = np.square(sets[0].mean - sets[1].mean).sum() + traces
    print(
        f"FID of {count} against {count} features: moments {both:.2f} s, distance {distance:.2f} s, together "
        f"{both + distance:.2f} s (medians of {repeats}); scipy's sqrtm alone {usual:.1f} s, {usual / distance:.1f} "
        f"times our distance; figures {frechet_distance(*sets):.9g} and {expected:.9g}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="panoptic images (default %(default)s)")
    parser.add_argument("--features", type=int, default=5000, help="feature vectors per set (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (default %(default)s)")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}")
    time_panoptic(args.images, args.repeats)
    time_fid(args.features, args.repeats)
