"""Comparisons with other packages, which may be missing: how they are imported, and ratios of timings."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from uvim_fsq.performance.timing import Measurement, Timing, milliseconds, rate

#: Import name -> package name and install command. panopticapi is not on PyPI, so it cannot be part of an extra.
PACKAGES = {
    "transformers": ("transformers", "pip install 'uvim-fsq[benchmark]'"),
    "vector_quantize_pytorch": ("vector-quantize-pytorch", "pip install 'uvim-fsq[benchmark]'"),
    "panopticapi": ("panopticapi", "pip install git+https://github.com/cocodataset/panopticapi.git"),
}


def find_package(name: str, submodule: str = "") -> tuple[Any, str]:
    """The module, or None if it is missing or broken, and a text for the table: its version or how to install it."""
    package, remedy = PACKAGES[name]
    try:
        module = importlib.import_module(f"{name}.{submodule}" if submodule else name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"not installed: {remedy}"
        return None, f"cannot be imported ({error}): {remedy}"
    except ImportError as error:
        return None, f"cannot be imported ({str(error).splitlines()[0]}): {remedy}"
    try:
        return module, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return module, "of unknown version"


def compare(
    name: str, timings: Mapping[str, Timing], *, ours: str, count: int = 1, unit: str = "ms", **other: Any
) -> list[Measurement]:
    """One line per variant in `timings`. All do the same work on `count` items per repeat.

    Lines are named "NAME, VARIANT". The line of `ours` gets the caller's `other` figures. Each of the other lines gets
    its time divided by ours; above 1 means that ours is faster.
    """
    lines = []
    for variant, timing in timings.items():
        make = rate if unit == "images/s" else milliseconds
        line = make(f"{name}, {variant}", timing, count)
        if variant == ours:
            lines.append(replace(line, other=other))
        else:
            lines.append(replace(line, other={"time / ours": timing.median / timings[ours].median}))
    return lines
