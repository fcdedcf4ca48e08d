"""Peak signal-to-noise ratio, and FID by the ColTran protocol (arXiv 2102.04432), as in UViM's evaluator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uvim_fsq.console import Bar
from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Metric
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize, prediction_uint8
from uvim_fsq.tasks.imagenet_color.data import PhotoSource
from uvim_fsq.tasks.imagenet_color.fid import Inception, Moments, fid_name, frechet_distance

#: Lower bound of the mean squared error, so that equal images get 100 dB instead of infinity.
SMALLEST_ERROR = 4e-10
#: Luma weights of the gray image in the UViM reference code (big_vision); they sum to 0.9999.
GREY = (0.2989, 0.5870, 0.1140)
FID_SIZE = 256
#: Image side at which the protocol colorizes.
COLTRAN_SIZE = 512
FID_BATCH = 50


def keep_luma(prediction: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The chroma of the prediction with the luma of the image; all (H, W, 3) float32 in [-1, 1].

    All three channels are shifted by the difference in luma, which leaves the chroma (YCbCr) unchanged.
    """
    weights = np.array(GREY, np.float32)
    shift = (image - prediction) @ weights / weights.sum()
    return (prediction + shift[..., None]).clip(-1, 1)


class PSNRMetric(Metric):
    """Mean over images of 10 log10(2^2 / mse) in dB, at the model's label size, for values in [-1, 1].

    `luma`: replace the luma of the prediction by that of the photo (a variant that `protocol` names).
    """

    def __init__(self, protocol: str, luma: bool) -> None:
        self.protocol, self.luma = protocol, luma
        self.sums = np.zeros(3)  # psnr, images, squared error

    def pictures(self, prediction: Any, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The images to compare: the prediction and the photo at its size, both (H, W, 3) float32 in [-1, 1]."""
        item = np.asarray(prediction, np.float32)
        truth = to_unit(resize_linear(sample.image, (item.shape[0], item.shape[1])), sample)
        return keep_luma(item, truth) if self.luma else item, truth

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        return self.add(*self.pictures(prediction, sample))

    def add(self, item: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Adds one image, given the two arrays from `pictures`, and returns its PSNR and MSE."""
        error = float(np.mean((item.astype(np.float64) - truth) ** 2))
        psnr = 10 * np.log10(4 / max(error, SMALLEST_ERROR))
        self.sums += [psnr, 1, error]
        return {"psnr": float(psnr), "mse": error}

    def state(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums = np.array(state["sums"])

    def compute(self) -> dict[str, float]:
        psnr, images, error = self.sums
        if images == 0:
            raise UserError("no image was evaluated")
        return {"psnr": float(psnr / images), "mse": float(error / images), "images": float(images)}


def to_unit(image: np.ndarray, sample: Sample) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1; for samples of the FID protocols, x / 128 - 1 (`meta["scale"]`)."""
    scale = np.float32(sample.meta.get("scale", 127.5))
    return image.astype(np.float32) / scale - 1


def reference_moments(source: PhotoSource, inception: Inception) -> Moments:
    """Moments of the Inception features of all photos, each cropped and area-resized to 256 x 256; cached on disk."""

    def make() -> dict[str, np.ndarray]:
        moments = Moments()
        with Bar("features of the reference photos", len(source)) as bar:
            for start in range(0, len(source), FID_BATCH):
                bar.update(start)
                rows = range(start, min(start + FID_BATCH, len(source)))
                images = np.stack([crop_and_resize(source[i].image, FID_SIZE) for i in rows])
                moments.add(inception.features(images))
        return moments.state()

    key = {
        "root": str(source.root.resolve()),
        "files": _fingerprint(source),
        "weights": inception.sha256,
        "size": FID_SIZE,
    }
    moments = Moments()
    moments.load_state(cached_arrays("fid_reference", key, make))
    return moments


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


class FIDMetric(Metric):
    """FID of the colorized images, and of the real images, against the same reference set; also PSNR.

    Predictions are area-resized to 256 x 256 and rounded; real photos are center-cropped and area-resized to the same
    size.

    Args:
        protocol: name recorded in the result.
        luma: see `PSNRMetric`.
        inception: the feature network.
        reference: returns the moments of the reference set; called only when they are needed.
        official: whether the two lists are ColTran's, so that 5,000 images colorized at 512 x 512 count as FID-5k.
    """

    def __init__(
        self, protocol: str, luma: bool, inception: Inception, reference: Callable[[], Moments], official: bool
    ) -> None:
        self.protocol, self.official = protocol, official
        self.inception, self.reference = inception, reference
        self.psnr = PSNRMetric(protocol, luma)
        self.moments = {"prediction": Moments(), "real": Moments()}
        self.waiting: dict[str, list[np.ndarray]] = {"prediction": [], "real": []}

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        item, truth = self.psnr.pictures(prediction, sample)
        self.official &= len(item) == COLTRAN_SIZE
        self.waiting["prediction"].append(prediction_uint8(item, FID_SIZE))
        self.waiting["real"].append(crop_and_resize(sample.meta["photo"], FID_SIZE))
        if len(self.waiting["real"]) >= FID_BATCH:
            self._flush()
        return self.psnr.add(item, truth)

    def _flush(self) -> None:
        for name, images in self.waiting.items():
            if images:
                self.moments[name].add(self.inception.features(np.stack(images)))
            images.clear()

    def state(self) -> dict[str, np.ndarray]:
        self._flush()
        state = {f"{name}/{key}": x for name, moments in self.moments.items() for key, x in moments.state().items()}
        return {**state, **self.psnr.state()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        for images in self.waiting.values():
            images.clear()
        self.psnr.load_state(state)
        for name, moments in self.moments.items():
            prefix = f"{name}/"
            moments.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def compute(self) -> dict[str, float]:
        self._flush()
        figures = self.psnr.compute()
        reference = self.reference()
        count, others = int(figures["images"]), int(reference.count)
        name = fid_name(count, others, self.official)
        return {
            name: frechet_distance(self.moments["prediction"], reference),
            f"{name} of the real images": frechet_distance(self.moments["real"], reference),
            "reference_images": float(others),
            **figures,
        }
