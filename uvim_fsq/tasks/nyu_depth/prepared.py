"""Converts images and depth maps to HDF5 for faster loading: 2 ms per sample instead of 5 ms for JPEG and 16-bit PNG.

`prepare` writes .h5 files like FastDepth's, with checksums, to a folder in the data set. The adapters read such a file
instead of the originals as long as these still have the same size and modification time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.encode import hdf5_bytes
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, read_json, write_json, write_whole
from uvim_fsq.tasks.nyu_depth.files import PairSource

FOLDER = "prepared_depth"


def _origin(source: PairSource, name: str, image: Path, depth: Path) -> tuple[str, Any]:
    """An image's path in the data set, and a fingerprint of the originals (None if one of them is missing)."""
    key, depth_key = (os.path.relpath(path, source.root) for path in (image, depth))
    try:
        mask = [source.masks[name]] if name in source.masks else []
        stats = [path.stat() for path in (image, depth, *mask)]
    except OSError:
        return key, None
    return key, [depth_key, source.scale, *([stat.st_size, stat.st_mtime_ns] for stat in stats)]


def _contents(root: Path) -> dict[str, Any]:
    """Image path -> fingerprint of its originals, for the files prepared so far."""
    try:
        return read_json(root / FOLDER / "contents.json", _advice(root))
    except FileNotFoundError:
        return {}


def _advice(root: Path) -> str:
    return f"delete {root / FOLDER} and run `uvim-fsq data prepare` again if you need it"


def use_prepared(source: PairSource) -> PairSource:
    """`source`, reading prepared files instead of unchanged originals where they exist."""
    contents = _contents(source.root)
    if not contents:
        return source
    pairs: list[tuple[str, Path, Path]] = []
    count = 0
    for name, image, depth in source.pairs:
        key, origin = _origin(source, name, image, depth)
        if origin is not None and contents.get(key) == origin:
            image = depth = source.root / FOLDER / f"{key}.h5"
            count += 1
        pairs.append((name, image, depth))
    share = "prepared" if count == len(pairs) else f"{count} of {len(pairs)} prepared"
    info = {**source.info, "layout": f"{source.info['layout']} ({share})"}
    return replace(source, pairs=pairs, info=info, broken=_advice(source.root))


def write_prepared(sources: list[PairSource], progress: Callable[[int, int], None]) -> str:
    """Writes every sample of `sources` as .h5 (2.1 MB at 480 x 640, depth in meters) and returns a one-line summary.

    Continues where it was stopped, and converts changed originals again. Unreadable samples are skipped and counted.
    Raises UserError if the disk is too small.
    """
    root = sources[0].root
    contents = _contents(root)
    todo = [(s, i, *_origin(s, *s.pairs[i])) for s in sources for i in range(len(s))]
    todo = [entry for entry in todo if entry[3] is None or contents.get(entry[2]) != entry[3]]
    if not todo:
        return f"all {sum(map(len, sources))} images are in {root / FOLDER} already"
    unreadable: list[str] = []
    try:
        for done, (source, index, key, origin) in enumerate(todo):
            progress(done, len(todo))
            if key.startswith(os.pardir):
                raise UserError(f"{source.pairs[index][1]} is outside of {root}; only data inside can be prepared")
            try:
                sample = source[index]
            except UserError as error:
                unreadable.append(str(error))
                continue
            image, depth = sample.image, sample.maps["depth"]
            if done == len(unreadable):  # the first readable sample
                _check_space(root, len(todo) * (image.nbytes + depth.nbytes))
            _write(inside(root / FOLDER, root / FOLDER / f"{key}.h5"), image, depth)
            contents[key] = origin
    finally:
        if contents:
            write_json(root / FOLDER / "contents.json", contents, indent=None)
    progress(len(todo), len(todo))
    summary = f"{len(todo) - len(unreadable)} images with their depth unpacked in {root / FOLDER}"
    return f"{summary}; {len(unreadable)} were skipped, the first: {unreadable[0]}" if unreadable else summary


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(f"{root} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are needed; free some space")


def _write(file: Path, image: np.ndarray, depth: np.ndarray) -> None:
    data = hdf5_bytes({"rgb": image.transpose(2, 0, 1), "depth": depth}, checked=True)
    write_whole(file, lambda path: path.write_bytes(data), durable=False)
