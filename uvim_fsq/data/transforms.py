"""Joint geometric transforms of image and label maps, each map with its own interpolation.

Shapes: H, W native image size; S model input size.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import cv2
import numpy as np

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.resize import LABEL_INTERPOLATION, resize_label_map, resize_linear
from uvim_fsq.data.sample import Array, Sample

# Loader processes and the training process already use all cores.
cv2.setNumThreads(0)


class Encoding(Protocol):
    """The part of a task that is needed to prepare samples; see `uvim_fsq.tasks.base.Task` for each member."""

    linear_maps: ClassVar[tuple[str, ...]]

    def evaluation_view(self, sample: Sample) -> Sample: ...

    def adjust(self, maps: dict[str, Array], scale: tuple[float, float], *, mirrored: bool) -> dict[str, Array]: ...

    def model_image(self, sample: Sample) -> Array: ...

    def encode(self, sample: Sample) -> dict[str, Array]: ...


class JointTransform:
    """Prepares samples for training and evaluation, and images without labels for prediction.

    Training: inception crop (UViM: area 5% to 100%, aspect ratio 3/4 to 4/3) or the whole image, flipped horizontally
    with probability 0.5, and with `data.color_jitter` other colors of the image. Evaluation: the whole evaluation view
    of the task. Images are resized bilinearly in uint8 without antialiasing, as in the UViM reference code
    (big_vision); maps by nearest neighbor with half-pixel centers, or bilinearly if listed in `Task.linear_maps`.
    """

    def __init__(self, data: DataConfig, task: Encoding, *, train: bool) -> None:
        self.task, self.train, self.size = task, train, data.image_size
        self._augmentation = _Augmentation(data, task.linear_maps) if train else None

    def __call__(self, sample: Sample, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], Sample]:
        """Sample -> image (3, S, S), labels, and the sample's evaluation view (in training, the sample itself).

        Deterministic in `seed`. Raises UserError if the task cannot encode the sample.
        """
        view = sample if self.train else self.task.evaluation_view(sample)
        return *self.encode(self.resample(view, seed)), view

    def picture(self, image: Array) -> np.ndarray:
        """(H, W, 3) uint8 -> the model input (3, S, S), prepared as in evaluation."""
        return self._image(self.resample(Sample("", image), 0))

    def encode(self, resized: Sample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The model input (3, S, S) and the labels of a sample that is already resized to (S, S)."""
        return self._image(resized), self.task.encode(resized)

    def resample(self, view: Sample, seed: int) -> Sample:
        """The sample resized to (S, S); in training, cropped and flipped at random by `seed`."""
        if self._augmentation is not None:
            image, maps, scale, mirrored = self._augmentation(view, seed)
        else:
            size = (self.size, self.size)
            image, mirrored = resize_linear(view.image, size), False
            maps = {name: self._resize_map(name, values) for name, values in view.maps.items()}
            scale = (self.size / view.image.shape[0], self.size / view.image.shape[1])
        if maps:  # a picture to predict has none
            maps = self.task.adjust(maps, scale, mirrored=mirrored)
        return Sample(view.id, image, maps, view.meta)

    def _resize_map(self, name: str, values: Array) -> Array:
        size = (self.size, self.size)
        return resize_linear(values, size) if name in self.task.linear_maps else resize_label_map(values, size)

    def _image(self, resized: Sample) -> np.ndarray:
        # cv2.split is several times faster than a NumPy copy of the transposed image.
        return np.stack(cv2.split(self.task.model_image(resized)))


class _Augmentation:
    """The augmentation of training, by Albumentations: crop and flip, the same for the image and all of its maps, and
    colors of the image alone.
    """

    def __init__(self, data: DataConfig, linear_maps: tuple[str, ...]) -> None:
        import albumentations as A  # the import takes more than a second

        self.size, self.linear_maps = data.image_size, linear_maps
        size = (data.image_size, data.image_size)
        sampling: dict[str, Any] = {
            "interpolation": cv2.INTER_LINEAR,
            "mask_interpolation": LABEL_INTERPOLATION,
        }
        self.fit: Any = A.Resize(*size, **sampling)
        if data.crop == "inception":
            self.fit = A.RandomResizedCrop(size, scale=data.crop_area, ratio=(3 / 4, 4 / 3), **sampling)
        self.flip: Any = A.HorizontalFlip(p=0.5) if data.hflip else None
        self.compose = A.Compose([self.fit] if self.flip is None else [self.fit, self.flip])
        # Apart from the geometry, which is then the same with and without it, and because maps may be images for
        # Albumentations.
        self.colors: Any = None
        if data.color_jitter is not None:
            self.colors = A.Compose([A.ColorJitter(*data.color_jitter, p=1)])

    def __call__(self, view: Sample, seed: int) -> tuple[Array, dict[str, Array], tuple[float, float], bool]:
        """Image and maps at size (S, S), the scale in new pixels per old pixel (rows, columns), and whether flipped."""
        # Albumentations ignores NumPy's global seed; each sample has its own.
        self.compose.set_random_seed(seed)
        # Maps are separate targets, because those in one list must have the same shape.
        kinds = {f"map_{name}": "image" if name in self.linear_maps else "mask" for name in view.maps}
        self.compose.add_targets(kinds)
        targets: dict[str, Any] = {f"map_{name}": values for name, values in view.maps.items()}
        done = self.compose(image=view.image, **targets)
        maps = {name: done[f"map_{name}"] for name in view.maps}
        # Albumentations stores the parameters of a transform's last call in `params`; none if it was not applied.
        left, top, right, bottom = self.fit.params.get("crop_coords", (0, 0, view.image.shape[1], view.image.shape[0]))
        scale = (self.size / (bottom - top), self.size / (right - left))
        return self._colored(done["image"], seed), maps, scale, self.flip is not None and bool(self.flip.params)

    def _colored(self, image: Array, seed: int) -> Array:
        """The image (S, S, 3) with other colors by `seed`, unless they are to stay."""
        if self.colors is None:
            return image
        # The seed itself would make the colors depend on where the crop is.
        self.colors.set_random_seed((seed + 1) % (1 << 32))
        return self.colors(image=image)["image"]
