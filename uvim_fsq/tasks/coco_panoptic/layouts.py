"""Finds the annotation file and the photos of a split in the layouts in which the data sets are distributed.

| layout | annotations | photos |
| --- | --- | --- |
| COCO panoptic | annotations/panoptic_{split}2017.json | {split}2017/ |
| Cityscapes | gtFine/cityscapes_panoptic_{split}.json | leftImg8bit/{split}/CITY/ |
| ADE20K | ade20k_panoptic_{split}.json | images/training/, images/validation/ |
| COCO instances | annotations/instances_{split}2017.json | {split}2017/ |

The last one also covers folders with photos and a `_annotations.coco.json` of their own, as annotation tools export
them. {split} is train or val.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uvim_fsq.data.folders import and_list
from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError

#: Names of the photo folders of ADE20K.
_LONG = {"train": "training", "val": "validation"}
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Layout:
    """Where one data set keeps its annotation files.

    Attributes:
        name: as printed by `uvim-fsq data check`.
        patterns: where its JSON files are, relative to the root, in order of preference.
        instances: whether they are instance annotations (masks in the JSON) instead of panoptic ones (id PNGs).
        classes, official: the official number of classes and, by the stem of the JSON file, of images.
    """

    name: str
    patterns: tuple[str, ...]
    instances: bool = False
    classes: int = 0
    official: Mapping[str, int] = field(default_factory=dict[str, int])


COCO = Layout(
    "COCO panoptic",
    ("annotations/panoptic_{split}*.json", "panoptic_{split}*.json"),
    classes=133,
    official={"panoptic_train2017": 118_287, "panoptic_val2017": 5_000},
)
CITYSCAPES = Layout(
    "Cityscapes panoptic",
    tuple(
        f"{folder}cityscapes_panoptic_{{split}}*.json" for folder in ("gtFine/", "gtFine_panoptic/", "annotations/", "")
    ),
    classes=19,
    official={
        f"cityscapes_panoptic_{split}{kind}": count
        for split, count in (("train", 2_975), ("val", 500))
        for kind in ("", "_trainId")
    },
)
ADE20K = Layout(
    "ADE20K panoptic",
    ("ade20k_panoptic_{split}*.json", "annotations/ade20k_panoptic_{split}*.json"),
    classes=150,
    official={"ade20k_panoptic_train": 20_210, "ade20k_panoptic_val": 2_000},
)
INSTANCES = Layout(
    "COCO instances",
    (
        "annotations/instances_{split}*.json",
        "instances_{split}*.json",
        "ade20k_instance_{split}*.json",
        "{split}*/_annotations.coco.json",
    ),
    instances=True,
    classes=80,
    official={"instances_train2017": 118_287, "instances_val2017": 5_000},
)
LAYOUTS = (COCO, CITYSCAPES, ADE20K, INSTANCES)


def _annotation_files(root: Path, layout: Layout, split: str) -> list[Path]:
    return sorted({file for pattern in layout.patterns for file in root.glob(pattern.replace("{split}", split))})


def find_annotations(root: Path, split: str, kind: str = "auto") -> tuple[Layout, Path]:
    """The layout of `root` and the JSON file of `split` ("train" or "val"). Raises UserError if there is none.

    Args:
        kind: `task.annotations`: only "panoptic" or only "instances" files, or "auto", instances if there is nothing
            else.
    """
    accepted = [layout for layout in LAYOUTS if kind == "auto" or layout.instances == (kind == "instances")]
    # Both splits must have the same layout: one with panoptic and one with instance labels would not fit together.
    for layout in accepted:
        files = {part: _annotation_files(root, layout, part) for part in _SPLITS}
        if files[split]:
            # Prefer the standard name to variants that other tools write.
            best = min(files[split], key=lambda file: (not file.stem.endswith("2017"), len(file.name), file.name))
            return layout, best
        if any(files.values()):
            break
    else:
        layout = accepted[0]
    raise UserError(_nothing_found(root, split, layout))


def _nothing_found(root: Path, split: str, layout: Layout) -> str:
    raw = raw_labels(root)
    if raw:
        return (
            f"{root} holds the original labels of {raw}, without a panoptic JSON of {split}; "
            f"run: uvim-fsq data convert {root} --task coco_panoptic"
        )
    others = sorted(file.name for place in ("annotations", "gtFine", ".") for file in (root / place).glob("*.json"))
    found = f", only {and_list(others)}" if others else ""
    wanted = layout.patterns[0].replace("{split}", split)
    return f"{root} holds no {wanted}{found}; the COCO panoptic format is expected, see datasets/README.md"


def raw_labels(root: Path) -> str:
    """The name of the data set whose original labels are in `root`, still to be converted; "" if there are none."""
    if any(next((root / "gtFine" / split).glob("*/*_gtFine_instanceIds.png"), None) for split in _SPLITS):
        return "Cityscapes"
    if any(next((root / "annotations_instance" / folder).glob("*.png"), None) for folder in _LONG.values()):
        return "ADE20K"
    return ""


def find_photos(root: Path, annotations: Path, image_dir: str, split: str) -> Path:
    """Finds the folder of the images. Raises UserError if there is none.

    `image_dir` (relative to `root`, with {split} replaced by train or training, val or validation) takes precedence
    over the standard places.
    """
    if image_dir:
        given = [root / image_dir.replace("{split}", part) for part in (split, _LONG[split])]
        for place in given:
            if place.is_dir():
                return place
        raise UserError(f"task.image_dir={image_dir}: {given[0]} is not a folder")
    if annotations.name == "_annotations.coco.json":
        return annotations.parent
    # The part of the name that says which photos: train2017 of panoptic_train2017.
    name = re.sub(r"^.*?(panoptic|instances?)_", "", annotations.stem)
    places = (
        name,
        f"images/{name}",
        split,
        f"images/{split}",
        f"leftImg8bit/{split}",
        f"images/{_LONG[split]}",
        "images",
    )
    for place in places:
        if (root / place).is_dir():
            return root / place
    others = and_list([f"{path.name}/" for path in sorted(root.iterdir()) if path.is_dir()])
    raise UserError(
        f"{root} holds no images: looked for {name}/ and images/{name}/, found {others or 'no folder'}; rename one or "
        "set task.image_dir to its name"
    )


def photo_name(image_id: str, file_name: str, file: Path) -> str:
    """The path of a photo in the folder of `find_photos`.

    Cityscapes' JSON names a file that does not exist (CITY_..._gtFine_leftImg8bit.png); the photo is in the city's
    folder and named after the image id. All other data sets name the file itself.
    """
    if not file_name.endswith("_gtFine_leftImg8bit.png"):
        return file_name
    return inner_name(f"{image_id.split('_')[0]}/{image_id}_leftImg8bit.png", file)
