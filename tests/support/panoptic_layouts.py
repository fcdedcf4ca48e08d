"""Small data sets in the layouts of COCO instances, Cityscapes and ADE20K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uvim_fsq.tasks.coco_panoptic.convert import ADE20K_STUFF

HEIGHT, WIDTH = 24, 32
#: Category id -> name, in the order of the file.
CATEGORIES = {3: "cat", 7: "cup", 90: "dog"}


def photo(path: Path, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def polygon(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def runs_of(mask: np.ndarray) -> list[int]:
    """The uncompressed RLE of a mask: lengths of runs in columns, beginning with zeros."""
    flat = np.concatenate([[0], mask.astype(int).ravel(order="F")])
    ends = np.append(np.flatnonzero(np.diff(flat)), len(flat) - 1)
    return np.diff(ends, prepend=0).tolist()


def crowd_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 20:] = True
    mask[3:5, 22:24] = False
    return mask


def instances_tree() -> dict[str, Any]:
    """Three images: overlapping polygons and a crowd; two parts and a hidden one; nothing."""
    annotations = [
        # A small cup in front of a large cat, listed first, and a crowd of dogs behind a dog.
        {"image_id": 11, "category_id": 7, "segmentation": [polygon(4, 4, 8, 8)]},
        {"image_id": 11, "category_id": 3, "segmentation": [polygon(1, 1, 16.4, 20.6)], "area": 301.5},
        {"image_id": 11, "category_id": 90, "segmentation": [polygon(18, 2, 24, 12)]},
        {
            "image_id": 11,
            "category_id": 90,
            "iscrowd": 1,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs_of(crowd_mask())},
        },
        {"image_id": 5, "category_id": 3, "segmentation": [polygon(0, 0, 5, 5), polygon(20, 10, 30, 22)]},
        # The same region twice: the one that is listed later covers the other.
        {"image_id": 5, "category_id": 90, "segmentation": [polygon(8, 8, 14, 14)]},
        {"image_id": 5, "category_id": 7, "segmentation": [polygon(8, 8, 14, 14)]},
    ]
    for number, annotation in enumerate(annotations):
        annotation.setdefault("iscrowd", 0)
        annotation["id"] = number  # some tools count from 0
        annotation.setdefault("area", 40.0)
    images = [{"id": i, "file_name": f"{i:03d}.png", "height": HEIGHT, "width": WIDTH} for i in (11, 5, 8)]
    categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_instances(root: Path, tree: dict[str, Any] | None = None) -> Path:
    """Photos and JSON of both splits; returns the JSON of val."""
    tree = tree or instances_tree()
    for split in ("train", "val"):
        for image in tree["images"]:
            photo(root / f"{split}2017" / image["file_name"])
        file = root / f"annotations/instances_{split}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree))
    return root / "annotations/instances_val2017.json"


def write_cityscapes(root: Path) -> dict[str, np.ndarray]:
    """Photos and instanceIds of two cities and one; returns the ids by image id."""
    rng, written = np.random.default_rng(0), {}
    # Ignored classes, stuff, a group of persons, persons, a car and an ignored caravan.
    values = np.array([0, 3, 7, 8, 11, 23, 24, 24000, 24001, 26003, 33000, 29000])
    for number, (split, city) in enumerate(
        (("train", "aachen"), ("train", "ulm"), ("val", "lindau"), ("test", "bonn"))
    ):
        ids = np.kron(rng.choice(values, (6, 8)), np.ones((4, 4), int)).astype(np.uint16)
        ids[:4, :12] = [24] * 4 + [24001] * 4 + [7] * 4
        image_id = f"{city}_00000{number}_000019"
        place = root / "gtFine" / split / city
        place.mkdir(parents=True)
        Image.fromarray(ids).save(place / f"{image_id}_gtFine_instanceIds.png")
        photo(root / "leftImg8bit" / split / city / f"{image_id}_leftImg8bit.png", seed=number)
        written[image_id] = ids.astype(int)
    return written


def write_ade20k(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Photos, semantic and instance PNGs and the class list; returns the pairs of maps by image id."""
    rng, written = np.random.default_rng(0), {}
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{i}\t0.1\t10\t5\tclass {i}, also {i}  " for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(lines) + "\n")
    for split, folder, count in (("train", "training", 2), ("val", "validation", 1)):
        for i in range(count):
            name = f"ADE_{split}_{i + 1:08d}"
            semantic = np.kron(rng.choice([0, 1, 3, 8, 13, 150], (6, 8)), np.ones((4, 4), int)).astype(np.uint8)
            number = np.kron(rng.integers(0, 4, (3, 4)), np.ones((8, 8), int))
            kind = np.array([0, 1, 4, 100])[number]  # classes 8, 13 and 150 of the 150
            for place, pixels in (
                ("annotations", semantic),
                ("annotations_instance", np.stack([kind, number, 0 * number], -1).astype(np.uint8)),
            ):
                (root / place / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / place / folder / f"{name}.png")
            photo(root / "images" / folder / f"{name}.jpg", seed=i)
            written[name] = semantic, number
    assert {8, 13, 150}.isdisjoint(ADE20K_STUFF)
    return written
