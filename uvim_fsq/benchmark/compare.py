"""What a user would take instead, beside ours in one run: packages that may be absent, and ratios of timings."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from uvim_fsq.performance.timing import Measurement, Timing, milliseconds, rate

#: Import name -> the package's name and how a user gets it. panopticapi is on no registry, so no extra can name it.
PACKAGES = {
    "transformers": ("transformers", "pip install 'uvim-fsq[benchmark]'"),
    "vector_quantize_pytorch": ("vector-quantize-pytorch", "pip install 'uvim-fsq[benchmark]'"),
    "panopticapi": ("panopticapi", "pip install git+https://github.com/cocodataset/panopticapi.git"),
}


def find_package(name: str, submodule: str = "") -> tuple[Any, str]:
    """The module (None if it is absent or broken), and what the table says of it: its version, or what to do."""
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
    name: str, timings: Mapping[str, Timing], *, ours: str, count: int = 1, unit: str = "ms", **further: Any
) -> list[Measurement]:
    """One line for each of `timings`, all of the same work, which is done `count` times in a repeat.

    Lines are called "NAME, WAY". Those of the other ways hold in `further` their time by ours: above 1 ours is faster.
    Ours holds the caller's `further`.
    """
    lines = []
    for way, timing in timings.items():
        make = rate if unit == "images/s" else milliseconds
        line = make(f"{name}, {way}", timing, count)
        if way == ours:
            lines.append(replace(line, further=further))
        else:
            lines.append(replace(line, further={"time / ours": timing.median / timings[ours].median}))
    return lines
