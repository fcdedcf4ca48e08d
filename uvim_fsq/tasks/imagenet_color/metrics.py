"""Metrics of colorized photos: PSNR, colorfulness, FID by the ColTran protocol (arXiv 2102.04432), as in UViM's
evaluator, and the Fréchet distance in the features of other networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Metric
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize, prediction_uint8
from uvim_fsq.tasks.imagenet_color.distances import FeatureDistance
from uvim_fsq.tasks.imagenet_color.fid import fid_name

#: Lower bound of the mean squared error, so that equal images get 100 dB instead of infinity.
SMALLEST_ERROR = 4e-10
#: Luma weights of the gray image in the UViM reference code (big_vision); they sum to 0.9999.
GRAY = (0.2989, 0.5870, 0.1140)
FID_SIZE = 256
#: Image side at which the protocol colorizes.
COLTRAN_SIZE = 512
#: Names of the mean colorfulness of the predictions and of the photos.
COLORFULNESS = ("colorfulness", "colorfulness of the photos")


def keep_luma(prediction: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The chroma of the prediction with the luma of the image; all (H, W, 3) float32 in [-1, 1].

    All three channels are shifted by the difference in luma, which leaves the chroma (YCbCr) unchanged.
    """
    weights = np.array(GRAY, np.float32)
    shift = (image - prediction) @ weights / weights.sum()
    return (prediction + shift[..., None]).clip(-1, 1)


def to_unit(image: np.ndarray, sample: Sample) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1; for samples of the FID protocols, x / 128 - 1 (`meta["scale"]`)."""
    scale = np.float32(sample.meta.get("scale", 127.5))
    return image.astype(np.float32) / scale - 1


def to_picture(prediction: np.ndarray) -> np.ndarray:
    """(H, W, 3) float in [-1, 1] -> uint8."""
    return ((prediction + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def colorfulness(image: np.ndarray) -> float:
    """How colorful an image (H, W, 3) uint8 looks: 0 for gray ones, about 15 for slightly and 109 for extremely
    colorful photos.

    M3 of Hasler and Süsstrunk, "Measuring colorfulness in natural images" (2003): with rg = R - G and
    yb = (R + G) / 2 - B, the length of their standard deviations plus 0.3 times the length of their means.
    """
    red, green, blue = image.astype(np.float64).reshape(-1, 3).T
    opponent = np.stack([red - green, (red + green) / 2 - blue])
    return float(np.linalg.norm(opponent.std(1)) + 0.3 * np.linalg.norm(opponent.mean(1)))


class PSNRMetric(Metric):
    """Mean over images of 10 log10(2^2 / mse) in dB, at the model's label size, for values in [-1, 1]; and of the
    colorfulness of the predictions and of the photos.

    Args:
        protocol: name recorded in the result.
        luma: replace the luma of the prediction by that of the photo (a variant that `protocol` names).
        distance: if given, also the Fréchet distance of the predictions, and of the photos, at label size.
    """

    def __init__(self, protocol: str, luma: bool, distance: FeatureDistance | None = None) -> None:
        self.protocol, self.luma, self.distance = protocol, luma, distance
        self.sums = np.zeros(5)  # psnr, images, squared error, colorfulness of predictions and of photos

    @property
    def details(self) -> dict[str, Any]:
        return {} if self.distance is None else {self.distance.name: self.distance.details}

    def pictures(self, prediction: Any, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The images to compare: the prediction and the photo at its size, both (H, W, 3) float32 in [-1, 1]."""
        item = np.asarray(prediction, np.float32)
        truth = to_unit(resize_linear(sample.image, (item.shape[0], item.shape[1])), sample)
        return keep_luma(item, truth) if self.luma else item, truth

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        item, truth = self.pictures(prediction, sample)
        return self.add(item, truth, to_picture(item), to_picture(truth))

    def add(self, item: np.ndarray, truth: np.ndarray, shown: np.ndarray, photo: np.ndarray) -> dict[str, float]:
        """Adds one image and returns its own values.

        Args:
            item, truth: from `pictures`, for the PSNR.
            shown, photo: the same as (S, S, 3) uint8, for colorfulness and distance.
        """
        if self.distance is not None:
            self.distance.add(shown, photo)
        error = float(np.mean((item.astype(np.float64) - truth) ** 2))
        psnr = 10 * np.log10(4 / max(error, SMALLEST_ERROR))
        colors = colorfulness(shown), colorfulness(photo)
        self.sums += [psnr, 1, error, *colors]
        return {"psnr": float(psnr), "mse": error, **dict(zip(COLORFULNESS, colors, strict=True))}

    def state(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.copy(), **(self.distance.state() if self.distance is not None else {})}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums = np.array(state["sums"])
        if self.distance is not None:
            self.distance.load_state(state)

    def compute(self) -> dict[str, float]:
        psnr, images, *others = self.sums.tolist()
        if images == 0:
            raise UserError("no image was evaluated")
        means = [other / images for other in others]
        figures = {"psnr": psnr / images, **dict(zip(("mse", *COLORFULNESS), means, strict=True)), "images": images}
        return figures if self.distance is None else {**figures, **self.distance.compute()}


class FIDMetric(Metric):
    """FID of the colorized images, and of the real images, against the same reference set; also PSNR and colorfulness.

    Predictions are area-resized to 256 x 256 and rounded; real photos are center-cropped and area-resized to the same
    size.

    Args:
        psnr: accumulates the other figures, from the same pictures.
        inception: accumulates the features of the Inception network.
        official: whether the two lists are ColTran's, so that 5,000 images colorized at 512 x 512 count as FID-5k.
    """

    def __init__(self, psnr: PSNRMetric, inception: FeatureDistance, official: bool) -> None:
        self.protocol, self.official = psnr.protocol, official
        self.psnr, self.inception = psnr, inception

    @property
    def details(self) -> dict[str, Any]:
        return {"fid": self.inception.details, **self.psnr.details}

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        item, truth = self.psnr.pictures(prediction, sample)
        self.official &= len(item) == COLTRAN_SIZE
        pictures = prediction_uint8(item, FID_SIZE), crop_and_resize(sample.meta["photo"], FID_SIZE)
        self.inception.add(*pictures)
        return self.psnr.add(item, truth, *pictures)

    def state(self) -> dict[str, np.ndarray]:
        return {**self.inception.state(), **self.psnr.state()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.inception.load_state(state)
        self.psnr.load_state(state)

    def compute(self) -> dict[str, float]:
        figures = self.psnr.compute()
        prediction, real, others = self.inception.distances()
        name = fid_name(int(figures["images"]), others, self.official)
        return {name: prediction, f"{name} of the real images": real, "reference_images": float(others), **figures}
