"""The Fréchet distance of colorized photos, and of the real ones, to a reference set in the features of a network.

Shapes: B batch; S side of the pictures; D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from uvim_fsq.console import Bar
from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize
from uvim_fsq.tasks.imagenet_color.data import PhotoSource
from uvim_fsq.tasks.imagenet_color.fid import Moments, frechet_distance

#: Pictures in one pass of a network.
BATCH = 50


class FeatureNetwork(Protocol):
    """A network that maps pictures to features.

    Attributes:
        name: the network.
        dim: D.
        sha256: hash of its weights.
    """

    name: str
    dim: int
    sha256: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 RGB of any size -> (B, D) float64."""
        ...


#: Fits a photo (H, W, 3) uint8 of the reference set to a side -> (S, S, 3) uint8.
FITS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "crop": crop_and_resize,
    "resize": lambda photo, side: resize_linear(photo, (side, side)),
}


class FeatureDistance:
    """Accumulates the features of predictions and of real photos; independent of batches and processes.

    Args:
        reference: the photos to compare with; their features are computed only when they are needed.
        network: the network.
        fit: how photos of the reference set are brought to the side of the pictures, a key of `FITS`.
        limit: use only so many photos of the reference set, evenly spaced; 0: all.
    """

    def __init__(self, reference: PhotoSource, network: FeatureNetwork, fit: str, limit: int = 0) -> None:
        self.reference, self.network, self.fit, self.limit = reference, network, fit, limit
        self.moments = {"prediction": Moments(network.dim), "real": Moments(network.dim)}
        self.waiting: dict[str, list[np.ndarray]] = {"prediction": [], "real": []}
        self.sides = 0.0  # sum of the pictures' sides, which are equal: a process without pictures learns it by it

    @property
    def name(self) -> str:
        """The figure's name. It is not an FID, which is the distance in the features of one Inception network."""
        return f"fd_{self.network.name}"

    @property
    def details(self) -> dict[str, Any]:
        """What the distance was computed with, for the result file."""
        return {
            "network": self.network.name,
            "weights_sha256": self.network.sha256,
            "features": self.network.dim,
            "reference_split": self.reference.info["split"],
            "reference_images": len(_rows(self.reference, self.limit)),
        }

    def add(self, prediction: np.ndarray, real: np.ndarray) -> None:
        """Adds one image: the prediction and the photo, both (S, S, 3) uint8."""
        self.sides += len(prediction)
        self.waiting["prediction"].append(prediction)
        self.waiting["real"].append(real)
        if len(self.waiting["real"]) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        for name, images in self.waiting.items():
            if images:
                self.moments[name].add(self.network.features(np.stack(images)))
            images.clear()

    def state(self) -> dict[str, np.ndarray]:
        """Sums and counts, float64; see `Metric.state`."""
        self._flush()
        named = {key: moments.state() for key, moments in self.moments.items()}
        state = {f"{self.name}/{key}/{part}": x for key, parts in named.items() for part, x in parts.items()}
        return {**state, f"{self.name}/sides": np.array([self.sides])}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces all that was added by the values of `state`, which may hold others besides."""
        for images in self.waiting.values():
            images.clear()
        for key, moments in self.moments.items():
            moments.load_state({part: state[f"{self.name}/{key}/{part}"] for part in moments.state()})
        self.sides = float(state[f"{self.name}/sides"][0])

    def distances(self) -> tuple[float, float, int]:
        """The distances of the predictions and of the real photos, and the number of reference photos.

        Raises UserError for fewer than two images in either set.
        """
        self._flush()
        count = self.moments["real"].count
        side = round(self.sides / max(count, 1))
        reference = reference_moments(self.reference, self.network, side, self.fit, self.limit)
        prediction, real = (frechet_distance(self.moments[key], reference) for key in ("prediction", "real"))
        return prediction, real, reference.count

    def compute(self) -> dict[str, float]:
        """`distances` by name."""
        prediction, real, count = self.distances()
        name = self.name
        return {name: prediction, f"{name} of the real images": real, f"{name} reference images": float(count)}


def reference_moments(source: PhotoSource, network: FeatureNetwork, side: int, fit: str, limit: int = 0) -> Moments:
    """Moments of the features of the photos of `source`, brought to (side, side) by `FITS[fit]`; cached on disk.

    `limit`: use only so many photos, evenly spaced; 0: all.
    """
    rows = _rows(source, limit)

    def make() -> dict[str, np.ndarray]:
        moments = Moments(network.dim)
        with Bar("features of the reference photos", len(rows)) as bar:
            for start in range(0, len(rows), BATCH):
                bar.update(start)
                images = np.stack([FITS[fit](source[int(i)].image, side) for i in rows[start : start + BATCH]])
                moments.add(network.features(images))
        return moments.state()

    key = {
        "root": str(source.root.resolve()),
        "files": _fingerprint(source),
        "weights": network.sha256,
        "size": side,
        **({} if fit == "crop" else {"fit": fit}),
        **({} if len(rows) == len(source) else {"photos": len(rows)}),
    }
    moments = Moments(network.dim)
    moments.load_state(cached_arrays("fid_reference", key, make))
    return moments


def _rows(source: PhotoSource, limit: int) -> np.ndarray:
    """The indices of all photos, or of `limit` evenly spaced ones."""
    count = len(source)
    return np.linspace(0, count - 1, limit if 0 < limit < count else count).round().astype(np.int64)


def _fingerprint(source: PhotoSource) -> str:
    """A hash of the names, sizes and modification times of all photos."""
    digest = hashlib.sha256()
    for name in source.names:
        try:
            stat = (source.root / name).stat()
        except OSError:
            continue  # reading the photo will report the error
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
