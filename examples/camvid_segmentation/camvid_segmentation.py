"""Semantic segmentation on CamVid, a task outside the package. docs/your_own_task.md builds this file step by step."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from uvim_fsq.data.folders import list_images
from uvim_fsq.data.images import read_image
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.splits import split_rows
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Baseline, Categorical, Metric, Task
from uvim_fsq.tasks.losses import pixel_cross_entropy
from uvim_fsq.tasks.registry import register_task

NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
UNLABELED = len(NAMES)
COLORS = (matplotlib.colormaps["tab20"](range(len(NAMES) + 1))[:, :3] * 255).astype(np.uint8)


class Photos:
    """Photos ROOT/{train,val}/NAME.jpg or .png with class indices in ROOT/{train,val}annot/NAME.png."""

    def __init__(self, root, split, label_suffix):
        folder = find_data_root(root) / ("val" if split == "val" else "train")
        files, self.labels = list_images([str(folder)]), Path(f"{folder}{label_suffix}")
        self.files = [files[row] for row in split_rows(split, [file.name for file in files])]
        self.info = {"layout": "CamVid", "split": split, "count": len(self.files), "root": root}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        photo = self.files[index]
        labels = self.labels / f"{photo.stem}.png"
        try:
            with Image.open(labels) as file:
                classes = np.array(file, np.int32)
        except OSError as error:
            raise UserError(f"{labels} cannot be read ({error}); each photo needs its label map") from error
        image = read_image(photo)
        if classes.shape != image.shape[:2] or classes.max() > UNLABELED:
            raise UserError(f"{labels} must be {image.shape[:2]} class indices 0..{UNLABELED}, got {classes.shape}")
        return Sample(photo.name, image, {"classes": classes})


class MeanIoU(Metric):
    """Intersection over union of each class, over the pixels of all images, and the mean over classes, in percent."""

    protocol = "camvid_segmentation/miou"

    def __init__(self):
        self.confusion = np.zeros((len(NAMES), len(NAMES)))

    def update(self, prediction, sample):
        truth = sample.maps["classes"]
        predicted = resize_nearest(prediction, truth.shape)
        valid = truth < UNLABELED
        pairs = truth[valid] * len(NAMES) + predicted[valid]
        self.confusion += np.bincount(pairs, minlength=len(NAMES) ** 2).reshape(len(NAMES), -1)
        return {"pixel_accuracy": 100 * float((truth == predicted).sum() / max(valid.sum(), 1))}

    def state(self):
        return {"confusion": self.confusion.copy()}

    def load_state(self, state):
        self.confusion = np.array(state["confusion"])

    def compute(self):
        right = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        if not union.any():
            raise UserError("no labeled pixel was evaluated")
        seen = [i for i in range(len(NAMES)) if union[i]]
        iou = {f"iou/{NAMES[i]}": float(100 * right[i] / union[i]) for i in seen}
        accuracy = float(100 * right.sum() / self.confusion.sum())
        return {"miou": float(np.mean(list(iou.values()))), "pixel_accuracy": accuracy, **iou}


@dataclass(frozen=True)
class Config:
    changeable = ("label_suffix",)  # where files are, not what the labels mean

    label_suffix: str = "annot"
    """The label maps of a split are in the folder named SPLIT + label_suffix."""


@register_task("camvid_segmentation")
class CamvidSegmentation(Task):
    Config = Config
    main_metric, smaller_is_better, secondary_metrics = "miou", False, ("pixel_accuracy",)

    @property
    def label_channels(self):
        return {"classes": Categorical(len(NAMES))}

    def source(self, root, split):
        return Photos(root, split, self.config.label_suffix)

    def encode(self, sample):
        classes = sample.maps["classes"].astype(np.int16)
        classes[classes == UNLABELED] = -1  # neither input nor loss
        return {"classes": classes}

    def loss(self, logits, labels):
        loss, accuracy = pixel_cross_entropy(logits["classes"], labels["classes"])
        return loss, {"accuracy": accuracy}

    def decode(self, logits):
        return list(logits["classes"].argmax(-1).cpu().numpy())

    def metric(self, source):
        return MeanIoU()

    def render(self, image, prediction, truth=None):
        maps = ({} if truth is None else {"ground truth": truth.maps["classes"]}) | {"prediction": prediction}
        return {title: (0.4 * image + 0.6 * COLORS[classes]).astype(np.uint8) for title, classes in maps.items()}

    def baseline(self, source, size):
        votes = np.zeros((size, size, len(NAMES)))
        for i in range(len(source)):
            votes += resize_nearest(source[i].maps["classes"], (size, size))[..., None] == np.arange(len(NAMES))
        common = votes.argmax(-1)
        return Baseline("most frequent class of each pixel in the training set", lambda image: common)
