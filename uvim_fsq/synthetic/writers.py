"""Writes rendered rooms in the on-disk formats of NYU Depth v2, COCO panoptic and ImageNet, and as PNGs of classes and
of surface normals.

Training image i is room i of the series, validation image i is room 10,000,000 + i. A data set is written to a
temporary folder and renamed when complete, so that it is never seen half-written. Independent of tasks and models.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from uvim_fsq.data.encode import deep_png_bytes, hdf5_bytes, picture_bytes
from uvim_fsq.data.pool import in_processes
from uvim_fsq.errors import UserError
from uvim_fsq.files import writing
from uvim_fsq.synthetic.render import CATEGORIES, Scene, render

VAL_START = 10_000_000
PER_FOLDER = 100
FOCAL = 518.8579  # the focal length that the NYU file lists give for every image; readers skip it
WNIDS = ("n90000001", "n90000002", "n90000003", "n90000004")

Size = int | tuple[int, int]
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class _Series:
    """An infinite series of scenes; see `uvim_fsq.synthetic.render.render`."""

    size: Size
    seed: int
    difficulty: str
    world: str

    def scene(self, index: int) -> Scene:
        return render(self.seed, index, self.size, self.difficulty, self.world)


@dataclass(frozen=True)
class _Job:
    """One image to render and store under `root`; `number` counts from 0 within its split."""

    root: Path
    split: str
    number: int
    series: _Series

    def scene(self) -> Scene:
        return self.series.scene(self.number + (VAL_START if self.split == "val" else 0))


@dataclass(frozen=True)
class _Plan:
    """All images of a data set, and how to render them."""

    num: int
    num_val: int
    series: _Series
    workers: int | None
    progress: ProgressCallback | None

    def jobs(self, root: Path) -> list[_Job]:
        train = [_Job(root, "train", i, self.series) for i in range(self.num)]
        return train + [_Job(root, "val", i, self.series) for i in range(self.num_val)]

    @contextmanager
    def run(self, function: Callable[[_Job], Any], root: Path) -> Iterator[Iterator[Any]]:
        """Yields the results of function(job), in order. All workers are gone when the block ends."""
        jobs = self.jobs(root)
        with closing(in_processes(function, jobs, self.workers or os.cpu_count() or 1)) as results:
            yield self._counted(results, len(jobs))

    def run_all(self, function: Callable[[_Job], None], root: Path) -> None:
        with self.run(function, root) as results:
            for _ in results:
                pass

    def _counted(self, results: Iterable[Any], total: int) -> Iterator[Any]:
        for done, result in enumerate(results, start=1):
            yield result
            if self.progress is not None:
                self.progress(done, total)


def write_dataset(
    format: str,
    out: Path,
    num: int,
    size: Size,
    seed: int = 0,
    num_val: int = 0,
    layout: str = "h5",
    difficulty: str = "varied",
    world: str = "rooms",
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Writes `num` training and `num_val` validation images in one of five formats.

    "nyu": one .h5 per frame (layout "h5"), the labeled .mat with its splits ("mat"), or BTS's files ("png").
    "coco_panoptic": images, id PNGs and the two JSON files of 2017. "semantic": photos, class PNGs and classes.txt.
    "imagenet": class folders for training and a flat val/; the classes are arbitrary. "normals": photos and 16-bit PNGs
    of `Scene.normals`, n stored as 32767.5 n + 32767.5.

    Args:
        out: the new data set's folder; must be empty or not exist.
        size: side of square images, or (height, width).
        seed: seed of the series of scenes.
        layout: "h5", "mat" or "png"; for "nyu" only.
        difficulty, world: see `uvim_fsq.synthetic.render.render`.
        workers: rendering processes; None: one per core; 1: in this process.
        progress: called with (images done, total).

    Raises:
        UserError: `out` is not an empty folder, or a format, layout, world or number is invalid.
    """
    writers = {"coco_panoptic": _coco_panoptic, "semantic": _semantic, "imagenet": _imagenet, "normals": _normals}
    nyu_writers = {"h5": _nyu_h5, "mat": _nyu_mat, "png": _nyu_png}
    if format != "nyu" and format not in writers:
        raise UserError(f'format "{format}" is unknown: use one of nyu, {", ".join(writers)}')
    if format == "nyu" and layout not in nyu_writers:
        raise UserError(f'NYU layout "{layout}" is unknown: use one of {", ".join(nyu_writers)}')
    writer = nyu_writers[layout] if format == "nyu" else writers[format]
    plan = _plan(num, num_val, _Series(size, seed, difficulty, world), workers, progress)
    with _fresh(out) as root:
        writer(plan, root)


# ---------------------------------------------------------------- folders and processes


def _plan(num: int, num_val: int, series: _Series, workers: int | None, progress: ProgressCallback | None) -> _Plan:
    """Checks the arguments before anything is written. Raises UserError."""
    if not 1 <= num <= VAL_START or num_val < 0:
        raise UserError(f"num = {num}, num_val = {num_val}: need 1 to {VAL_START} training and 0 or more val images")
    if series.seed < 0 or (workers is not None and workers < 1):
        raise UserError(f"seed = {series.seed}, workers = {workers}: need a seed of 0 or more and at least one worker")
    try:
        series.scene(0)
    except ValueError as error:
        raise UserError(str(error)) from error
    return _Plan(num, num_val, series, workers, progress)


@contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out` that is renamed to `out` if the block succeeds and deleted if it fails."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: delete it or choose another name")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            root.chmod(0o755)  # mkdtemp creates folders that only their owner can read
            yield root
            if out.exists():
                out.rmdir()
            root.rename(out)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise


# ---------------------------------------------------------------- NYU Depth v2


def _nyu_h5(plan: _Plan, root: Path) -> None:
    for job in plan.jobs(root):
        _h5_path(job).parent.mkdir(parents=True, exist_ok=True)
    plan.run_all(_store_h5, root)


def _h5_path(job: _Job) -> Path:
    if job.split == "val":
        return job.root / f"nyudepthv2/val/official/{job.number + 1:05d}.h5"
    room, frame = divmod(job.number, PER_FOLDER)
    return job.root / f"nyudepthv2/train/room_{room + 1:04d}/{frame + 1:05d}.h5"


def _store_h5(job: _Job) -> None:
    scene = job.scene()
    arrays = {"rgb": scene.image.transpose(2, 0, 1), "depth": scene.depth}
    _h5_path(job).write_bytes(hdf5_bytes(arrays))


def _png_names(job: _Job) -> tuple[str, str]:
    """Paths of image and depth map below sync/ (train) or official_splits/test/ (val)."""
    room, frame = divmod(job.number, PER_FOLDER)
    folder, number = ("room", job.number) if job.split == "val" else (f"room_{room + 1:04d}a", frame)
    return f"{folder}/rgb_{number:05d}.jpg", f"{folder}/sync_depth_{number:05d}.png"


def _nyu_png(plan: _Plan, root: Path) -> None:
    tops = {"train": root / "sync", "val": root / "official_splits/test"}
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for job in plan.jobs(root):
        picture, depth = _png_names(job)
        (tops[job.split] / picture).parent.mkdir(parents=True, exist_ok=True)
        slash = "/" if job.split == "train" else ""  # only the training list's paths begin with one
        lists[job.split].append(f"{slash}{picture} {slash}{depth} {FOCAL}\n")
    (root / "nyudepthv2_train_files_with_gt.txt").write_text("".join(lists["train"]))
    (root / "nyudepthv2_test_files_with_gt.txt").write_text("".join(lists["val"]))
    plan.run_all(partial(_store_png, tops), root)


def _store_png(tops: dict[str, Path], job: _Job) -> None:
    scene = job.scene()
    picture, depth = _png_names(job)
    (tops[job.split] / picture).write_bytes(_jpeg(scene))
    millimeters = np.floor(scene.depth * 1000).astype(np.uint16)
    (tops[job.split] / depth).write_bytes(picture_bytes(millimeters))


def _jpeg(scene: Scene) -> bytes:
    return picture_bytes(scene.image, "JPEG", quality=95, subsampling=0)


def _nyu_mat(plan: _Plan, root: Path) -> None:
    """Writes the arrays as h5py sees MATLAB's column-major order: (N, 3, W, H) and (N, W, H)."""
    total = plan.num + plan.num_val
    size = plan.series.size
    height, width = (size, size) if isinstance(size, int) else size
    places = _interleaved(plan.num, plan.num_val)
    shapes = {
        "images": (total, 3, width, height),
        "depths": (total, width, height),
        "rawDepths": (total, width, height),
    }
    file = root / "nyu_depth_v2_labeled.mat"
    starts = _preallocate(file, shapes)
    with plan.run(_frame, root) as frames, file.open("r+b") as opened:
        for place, arrays in zip(places, frames, strict=True):
            for start, array in zip(starts, arrays, strict=True):
                opened.seek(start + place * array.nbytes)
                opened.write(array.transpose().tobytes())
    index = np.array(places, np.int64).astype(np.uint16 if total < 2**16 else np.uint32) + 1
    splits = {"trainNdxs": index[: plan.num, None], "testNdxs": index[plan.num :, None]}
    scipy.io.savemat(root / "splits.mat", splits)


def _preallocate(file: Path, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Creates an HDF5 file of uninitialized arrays (4-D: uint8, 3-D: float32) and returns their byte offsets.

    The values are then written as plain bytes, because HDF5 aborts the process if the disk is full.
    """
    with file.open("wb") as opened:
        opened.write(bytes(1 << 16))  # more than the file's metadata takes
        opened.truncate(sum(math.prod(shape) * (1 if len(shape) == 4 else 4) for shape in shapes.values()) + (1 << 16))
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(file, "w") as handle:
        for name, shape in shapes.items():
            kind = h5py.h5t.py_create(np.dtype(np.uint8 if len(shape) == 4 else np.float32))
            h5py.h5d.create(handle.id, name.encode(), kind, h5py.h5s.create_simple(shape), options)
        return [handle[name].id.get_offset() for name in shapes]


def _interleaved(num: int, num_val: int) -> list[int]:
    """0-based positions of the training images, then of the validation images, interleaved as in the real file."""
    order = sorted(range(num + num_val), key=lambda i: (i + 0.5) / num if i < num else (i - num + 0.5) / num_val)
    places = [0] * len(order)
    for place, item in enumerate(order):
        places[item] = place
    return places


def _frame(job: _Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (H, W, 3), depth (H, W), and the depth with a few rectangular holes (0) like those of a real sensor."""
    scene = job.scene()
    rng = np.random.default_rng([job.series.seed, job.number, job.split == "val"])
    holed = scene.depth.copy()
    height, width = holed.shape
    for _ in range(int(rng.integers(2, 6))):
        row, column = int(rng.integers(height)), int(rng.integers(width))
        holed[row : row + max(1, height // 8), column : column + max(1, width // 8)] = 0
    return scene.image, scene.depth, holed


# ---------------------------------------------------------------- COCO panoptic, PNGs of classes and normals, ImageNet


def _coco_panoptic(plan: _Plan, root: Path) -> None:
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        (root / f"annotations/panoptic_{split}2017").mkdir(parents=True)
    with plan.run(_store_coco, root) as results:
        entries = list(results)
    series = plan.series
    info = {
        "description": f"synthetic {series.world.replace('_', ' ')}",
        "seed": series.seed,
        "difficulty": series.difficulty,
    }
    for split, part in (("train", entries[: plan.num]), ("val", entries[plan.num :])):
        document = {
            "info": info,
            "licenses": [],
            "images": [image for image, _ in part],
            "annotations": [annotation for _, annotation in part],
            "categories": CATEGORIES,
        }
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(document))


def _store_coco(job: _Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stores image and id map; returns their entries for `images` and `annotations`. Ids use all three channels."""
    scene = job.scene()
    number = job.number + 1 + (VAL_START if job.split == "val" else 0)
    name, folder = f"{number:012d}", f"{job.split}2017"
    ids = np.array([0, *(_panoptic_id(info["id"]) for info in scene.segments_info)], np.int32)[scene.segments]
    (job.root / folder / f"{name}.jpg").write_bytes(_jpeg(scene))
    coded = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    (job.root / f"annotations/panoptic_{folder}/{name}.png").write_bytes(picture_bytes(coded))
    segments = [_segment(scene.segments == info["id"], info) for info in scene.segments_info]
    height, width = scene.segments.shape
    image = {"id": number, "file_name": f"{name}.jpg", "height": height, "width": width}
    return image, {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}


def _panoptic_id(segment: int) -> int:
    """Distinct ids beyond 65535, as in COCO, so that a reader that drops a channel or overflows fails."""
    return segment * 1_234_567 % (1 << 24)


def _segment(mask: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": _panoptic_id(info["id"]),
        "category_id": info["category_id"],
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
    }


def _make_folders(root: Path, *kinds: str) -> None:
    for split in ("train", "val"):
        for kind in kinds:
            (root / split / kind).mkdir(parents=True)


def _semantic(plan: _Plan, root: Path) -> None:
    _make_folders(root, "images", "labels")
    lines = (" ".join(map(str, (category["name"], *category["color"]))) for category in CATEGORIES)
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    plan.run_all(_store_semantic, root)


def _store_semantic(job: _Job) -> None:
    """Stores image and class map; classes are numbered in the order of `CATEGORIES`."""
    scene = job.scene()
    number = {category["id"]: i for i, category in enumerate(CATEGORIES)}
    classes = np.array([0, *(number[info["category_id"]] for info in scene.segments_info)], np.uint8)[scene.segments]
    (job.root / job.split / "images" / f"{job.number:06d}.jpg").write_bytes(_jpeg(scene))
    (job.root / job.split / "labels" / f"{job.number:06d}.png").write_bytes(picture_bytes(classes))


def _normals(plan: _Plan, root: Path) -> None:
    _make_folders(root, "images", "normals")
    plan.run_all(_store_normals, root)


def _store_normals(job: _Job) -> None:
    """16 bits, because 8 would be off by up to 0.4 degrees."""
    scene = job.scene()
    coded = (scene.normals.astype(np.float64) * 32767.5 + 32767.5).round().clip(0, 65535).astype(np.uint16)
    (job.root / job.split / "images" / f"{job.number:06d}.jpg").write_bytes(_jpeg(scene))
    (job.root / job.split / "normals" / f"{job.number:06d}.png").write_bytes(deep_png_bytes(coded))


def _imagenet(plan: _Plan, root: Path) -> None:
    (root / "val").mkdir()
    for wnid in WNIDS:
        (root / "train" / wnid).mkdir(parents=True)
    plan.run_all(_store_imagenet, root)


def _store_imagenet(job: _Job) -> None:
    wnid = WNIDS[job.number % len(WNIDS)]
    train, val = f"train/{wnid}/{wnid}_{job.number}.JPEG", f"val/ILSVRC2012_val_{job.number + 1:08d}.JPEG"
    (job.root / (val if job.split == "val" else train)).write_bytes(_jpeg(job.scene()))
