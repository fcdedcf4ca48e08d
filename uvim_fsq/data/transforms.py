"""Geometry, once per sample and for image and labels together; each map with its own interpolation."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from uvim_fsq.config import DataConfig
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.base import Task

# Loader processes and the training process share the cores; OpenCV's own threads only get in the way.
cv2.setNumThreads(0)


class JointTransform:
    """Sample -> (image (3, S, S) uint8, labels, the sample's evaluation view).

    Training: inception crop (UViM: area 5% to 100%, aspect 3/4 to 4/3) or the whole image, mirrored half of the time.
    Evaluation: the task's evaluation view, whole. Images are resized bilinearly without antialiasing on uint8, as the
    reference does; maps by nearest neighbour with half-pixel centres, `Task.linear_maps` bilinearly.
    """

    def __init__(self, data: DataConfig, task: Task, *, train: bool) -> None:
        import albumentations as A  # takes more than a second

        self.task, self.train = task, train
        size = (data.image_size, data.image_size)
        sampling: dict[str, Any] = {
            "interpolation": cv2.INTER_LINEAR,
            # OpenCV's plain INTER_NEAREST takes the pixel to the left of the centre for half of the columns.
            "mask_interpolation": cv2.INTER_NEAREST_EXACT,
        }
        self.size = data.image_size
        self.fit: Any = A.Resize(*size, **sampling)
        if train and data.crop == "inception":
            self.fit = A.RandomResizedCrop(size, scale=data.crop_area, ratio=(3 / 4, 4 / 3), **sampling)
        self.flip: Any = A.HorizontalFlip(p=0.5) if train and data.hflip else None
        steps = [self.fit] if self.flip is None else [self.fit, self.flip]
        self.compose = A.Compose(steps)

    def __call__(self, sample: Sample, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], Sample]:
        """Deterministic in `seed`. Raises UserError where the task cannot encode the sample."""
        view = sample if self.train else self.task.evaluation_view(sample)
        return *self.encode(self.resample(view, seed)), view

    def resample(self, view: Sample, seed: int) -> Sample:
        """The sample at the models' size, in training cropped and mirrored by `seed`."""
        if self.train:
            # Albumentations ignores numpy's global seed; each sample brings its own.
            self.compose.set_random_seed(seed)
        # One by one, since a list of maps must be of one shape.
        kinds = {f"map_{name}": "image" if name in self.task.linear_maps else "mask" for name in view.maps}
        self.compose.add_targets(kinds)
        targets: dict[str, Any] = {f"map_{name}": values for name, values in view.maps.items()}
        done = self.compose(image=view.image, **targets)
        maps = {name: done[f"map_{name}"] for name in view.maps}
        # Albumentations leaves there what a transform did at its last call, nothing if it did not act.
        left, top, right, bottom = self.fit.params.get("crop_coords", (0, 0, view.image.shape[1], view.image.shape[0]))
        scale = (self.size / (bottom - top), self.size / (right - left))
        maps = self.task.adjust(maps, scale, mirrored=self.flip is not None and bool(self.flip.params))
        return Sample(view.id, done["image"], maps, view.meta)

    def encode(self, resized: Sample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the models may see of it (3, S, S), and its labels."""
        image = self.task.model_image(resized)
        labels = self.task.encode(resized)
        # OpenCV takes the channels apart several times faster than NumPy copies the transposed picture.
        return np.stack(cv2.split(image)), labels
