"""The keys under `task:` of semantic_segmentation. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SemanticSegmentationConfig:
    """The keys under `task:` of semantic segmentation."""

    changeable = (
        *("image_dir", "label_dir", "image_suffix", "label_suffix", "list_file", "class_file", "enlarge"),
        *("image_column", "label_column"),
    )

    image_dir: str = ""
    """Folder of the photos, relative to data.root, if not in a standard place; {split} becomes train or val."""
    label_dir: str = ""
    """Folder of the class PNGs likewise; each is named like its photo."""
    image_suffix: str = ""
    """What the names of photos have in addition before the extension, e.g. _leftImg8bit in Cityscapes."""
    label_suffix: str = ""
    """What the names of class PNGs have in addition, e.g. _gtFine_labelTrainIds in Cityscapes."""
    list_file: str = ""
    """File that lists the photos of a split by name, relative to data.root; {split} becomes train or val."""
    class_file: str = ""
    """File that names the classes, relative to data.root; empty: classes.txt, .csv or .json, or another usual name."""
    image_column: str = "image"
    """Data saved by the library datasets: column of the photos."""
    label_column: str = "label"
    """Likewise, column of the class maps, which are pictures or arrays."""
    ignore: tuple[int, ...] = (255,)
    """Pixel values that mean "no label": no input, no loss, not scored."""
    ignore_names: tuple[str, ...] = ()
    """Classes of the class file that mean "no label", by name, e.g. [Void]."""
    enlarge: Literal["nearest", "linear"] = "nearest"
    """How predictions get the photo's size: the class map by nearest neighbor, or the probabilities bilinearly."""
    classes: tuple[tuple[int, str, str], ...] = ()
    """(pixel value, name, color as #rrggbb or empty) of each class; from the class file, and kept in the checkpoint."""
