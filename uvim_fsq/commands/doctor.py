"""`uvim-fsq doctor`: describes the installation and the machine, for bug reports. Prints nothing private."""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

HELP = "describe the installation and the machine, for bug reports"
#: Modules without which nothing works.
NEEDED = ("torch", "torchvision", "cv2", "h5py", "timm", "accelerate")
#: Variables whose values are shown. Others, such as tokens, are not read.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HF_HUB_OFFLINE", "UVIM_FSQ_TRUST")
#: GB below which shared memory and disks are warned about.
LOW_SHARED, LOW_DISK = 1.0, 10.0
PACKAGE = "uvim-fsq"

Facts = dict[str, Any]


class Report:
    """Facts by section, and what is wrong: `broken` things the package needs, `warnings` about others."""

    def __init__(self) -> None:
        self.facts: dict[str, Facts] = {}
        self.broken: list[str] = []
        self.warnings: list[str] = []

    def add(self, section: str, collect: Callable[[Report], Facts]) -> None:
        """Adds a section. A part of the system that cannot be asked is named, and does not hide the others."""
        try:
            self.facts[section] = collect(self)
        except Exception as error:
            self.facts[section] = {}
            self.warnings.append(f"{section}: cannot be determined ({private(f'{type(error).__name__}: {error}')})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")


def run(args: argparse.Namespace) -> None:
    """Prints the report. Exits with code 1 if something that the package needs is broken."""
    report = examine()
    if args.json:
        print(json.dumps({**report.facts, "broken": report.broken, "warnings": report.warnings}, indent=2))
    else:
        for section, facts in report.facts.items():
            print(f"{section}: {', '.join(f'{key} {_text(value)}' for key, value in facts.items()) or 'unknown'}")
        for kind in ("warnings", "broken"):
            for line in getattr(report, kind):
                print(f"{kind.removesuffix('s')}: {line}")
        print("nothing is broken" if not report.broken else f"{len(report.broken)} thing(s) broken")
    if report.broken:
        raise SystemExit(1)


def examine() -> Report:
    """Asks everything."""
    report = Report()
    sections = {
        "package": _package,
        "libraries": _libraries,
        "extras": _extras,
        "gpu": _gpus,
        "compiler": _compiler,
        "processor": _processor,
        "memory": _memory,
        "disk": _disk,
        "data": _data,
        "hub": _hub,
        "variables": lambda _: {name: private(os.environ[name]) for name in VARIABLES if name in os.environ},
    }
    for name, collect in sections.items():
        report.add(name, collect)
    return report


def private(text: str | Path) -> str:
    """The text with the home folder as ~, and the name of the user and of the machine left out."""
    shown = str(text).replace("\n", " ")
    home = os.path.expanduser("~")
    if len(home) > 1:
        shown = shown.replace(home, "~")
    try:
        names = [getpass.getuser(), platform.node()]
    except (KeyError, OSError):  # a container's user without a name
        names = [platform.node()]
    for name, word in zip(names[::-1], ("HOST", "USER"), strict=False):
        if name and name != "root":
            shown = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, shown)
    return shown


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 1)


def _package(report: Report) -> Facts:
    from uvim_fsq.version import __version__

    try:
        system = platform.freedesktop_os_release()
    except OSError:  # no Linux
        system = {}
    return {
        PACKAGE: __version__,
        "Python": platform.python_version(),
        "system": system.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def _requirements() -> Iterator[tuple[Any, str]]:
    """The requirements that the installed package states, and the extra that each belongs to, or ""."""
    from packaging.requirements import Requirement

    for text in requires(PACKAGE) or []:
        found = Requirement(text)
        extra = re.search(r"extra == [\"']([\w-]+)", text)
        if found.marker is None or found.marker.evaluate({"extra": extra.group(1) if extra else ""}):
            yield found, extra.group(1) if extra else ""


def _libraries(report: Report) -> Facts:
    versions: Facts = {}
    try:
        needed = [requirement for requirement, extra in _requirements() if not extra]
    except PackageNotFoundError:
        report.warnings.append(f"{PACKAGE} is not installed; its requirements cannot be compared")
        needed = []
    for requirement in needed:
        try:
            versions[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            report.broken.append(f"{requirement.name} is not installed; pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            report.broken.append(f"{requirement.name} {versions[requirement.name]} does not fit {requirement}")
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            report.broken.append(f"{name} cannot be imported ({private(f'{type(error).__name__}: {error}')[:300]})")
    return versions


def _extras(report: Report) -> Facts:
    extras: dict[str, bool] = {}
    for requirement, extra in _requirements():
        if extra:
            try:
                fits = requirement.specifier.contains(version(requirement.name), prereleases=True)
            except PackageNotFoundError:
                fits = False
            extras[extra] = extras.get(extra, True) and fits
    names = distribution(PACKAGE).metadata.get_all("Provides-Extra") or []
    # An extra without a requirement here is one for other versions of Python.
    return {
        "installed": [name for name in names if extras.get(name)],
        "missing": [name for name in names if not extras.get(name)],
    }


def _gpus(report: Report) -> Facts:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    text = re.search(r"(\d+\.\d+(?:\.\d+)?)", driver.read_text()) if driver.is_file() else None
    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    if text is not None and not count:
        report.warnings.append(
            "there is an NVIDIA driver, but torch sees no GPU; see its own message with torch.cuda.init()"
        )
    return {
        "torch built for CUDA": torch.version.cuda or "none",
        "driver": text.group(1) if text is not None else "none",
        "devices": [f"{p.name} ({_gigabytes(p.total_memory)} GB)" for p in found],
    }


def _compiler(report: Report) -> Facts:
    from uvim_fsq.compilation import COMPILERS

    found = [name for name in COMPILERS if shutil.which(name)]
    if not found and "CXX" not in os.environ:
        report.warnings.append("no C++ compiler: train.compile and eval.compile need one; install g++")
    return {"found": found, "CXX set": "CXX" in os.environ}


def _processor(report: Report) -> Facts:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": os.cpu_count(), "usable": usable, "torch threads": torch.get_num_threads()}


def _memory(report: Report) -> Facts:
    facts: Facts = {}
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.M))
        facts = {
            "GB": _gigabytes(int(sizes["MemTotal"]) * 1024),
            "free GB": _gigabytes(int(sizes["MemAvailable"]) * 1024),
        }
    if Path("/dev/shm").is_dir():
        facts["free shared GB"] = _gigabytes(shutil.disk_usage("/dev/shm").free)
        if facts["free shared GB"] < LOW_SHARED:
            report.warnings.append(
                f"/dev/shm has {facts['free shared GB']} GB free; loader workers need it (in Docker: --ipc=host)"
            )
    return facts


def _disk(report: Report) -> Facts:
    from uvim_fsq.data.cache import cache_dir

    facts: Facts = {}
    for name, place in {"here": Path.cwd(), "cache": cache_dir()}.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        free = _gigabytes(shutil.disk_usage(there).free)
        facts[f"{name} ({private(place)}) free GB"] = free
        if free < LOW_DISK:
            report.warnings.append(f"{private(place)} has only {free} GB free")
        if not os.access(there, os.W_OK):
            report.warnings.append(f"{private(place)} is not writable")
    return facts


def _data(report: Report) -> Facts:
    """The data sets of the shipped configurations that are there. Names of other folders are not shown."""
    from uvim_fsq.config.shipped import find_config, shipped_names

    base = Path(os.environ.get("UVIM_FSQ_DATA", "datasets"))
    texts = [find_config(name).read_text(encoding="utf-8") for name in shipped_names()]
    names = sorted({name for text in texts for name in re.findall(r"^\s+root: ([\w./-]+)", text, re.M)})
    return {"in": private(base), "there": base.is_dir(), "found": [name for name in names if (base / name).is_dir()]}


def _hub(report: Report) -> Facts:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    models = len(list(place.glob("models--*"))) if place.is_dir() else 0
    return {"cache": private(place), "there": place.is_dir(), "models": models}
