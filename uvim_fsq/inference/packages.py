"""Compiled predictions on disk: AOTInductor packages in a checkpoint's folder compiled/, and when they may be used.

A manifest describes the packages of one torch version and one device, one package per batch size. Packages are native
code. They are loaded only if this user compiled them, which a list in the cache folder records by SHA-256, or if the
user trusts the run.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.checkpoints.run_directory import STATE, file_hash, recorded_hashes
from uvim_fsq.checkpoints.tuned import TUNED_KEYS
from uvim_fsq.config.plugins import trusts_runs
from uvim_fsq.data.cache import cache_dir, owned_by_user
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json, write_json, write_text
from uvim_fsq.version import __version__

FOLDER = "compiled"
#: Keys of `eval` that a package depends on.
SETTINGS = (*TUNED_KEYS, "precision", "int8_cross_kv")
#: In the cache folder: the SHA-256 of each package that this user compiled and each torch program that this user
#: exported, one a line.
OWN_PACKAGES = "compiled_packages.txt"
REMEDY = "run `uvim-fsq compile` again, or delete the folder"


@dataclass(frozen=True)
class Packages:
    """The usable packages of a checkpoint.

    Attributes:
        files: batch size -> package, and its SHA-256.
        dtype: of the images that they take, as text, e.g. "uint8".
    """

    files: dict[int, tuple[Path, str]]
    dtype: str


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a compiled package depends on: the device's type and name, its capability and the CPU's instructions."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": found.name, "capability": f"{found.major}.{found.minor}", "instructions": []}
    name, flags = _processor()
    return {
        "type": device.type,
        "name": name,
        "capability": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "instructions": flags,
    }


def _processor() -> tuple[str, list[str]]:
    """The CPU's name, and the instruction sets that the kernel lists for it (Linux on x86; else none)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name, flags = (re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE) for key in ("model name", "flags"))
    return name.group(1) if name else platform.processor(), sorted(flags.group(1).split()) if flags else []


def describe(loaded: LoadedRun | LoadedDirect, device: torch.device) -> dict[str, Any]:
    """What a package of a loaded checkpoint on a device depends on, as its manifest records it."""
    sums = recorded_hashes(loaded.checkpoint)
    config = loaded.run.eval
    return {
        "uvim_fsq": __version__,
        "torch": torch.__version__,
        "device": describe_device(device),
        # The compiler generates code for this number.
        "threads": torch.get_num_threads(),
        "checkpoint": {name: value for name, value in sums.items() if name != STATE},
        "settings": {key: getattr(config, key) for key in SETTINGS if hasattr(config, key)},
    }


def manifest_name(described: Mapping[str, Any]) -> str:
    """The manifest's file name: the versions of torch and the device that it is about."""
    device = described["device"]
    text = f"{device['type']} {device['name']} {device['capability']} torch {described['torch']}"
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") + ".json"


def write_manifest(folder: Path, described: Mapping[str, Any], packages: Packages) -> Path:
    """Records new packages in `folder`, as this user's own, and deletes those that they replace."""
    file = folder / manifest_name(described)
    add_own_files({sha256 for _, sha256 in packages.files.values()})
    files = {str(size): {"file": path.name, "sha256": sha256} for size, (path, sha256) in packages.files.items()}
    write_json(file, {**described, "dtype": packages.dtype, "packages": files})
    kept = {path.name for path, _ in packages.files.values()}
    for old in folder.glob(f"{file.stem}-batch*.pt2"):
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return file


def find_packages(loaded: LoadedRun | LoadedDirect, device: torch.device) -> Packages | None:
    """The packages that fit a loaded checkpoint and its settings on a device, or None.

    Warns, in one line that says why, if there are some but none can be used.
    """
    folder = loaded.checkpoint / FOLDER
    manifests = sorted(folder.glob("*.json"))
    if not manifests:
        return None
    described = describe(loaded, device)
    file = folder / manifest_name(described)
    try:
        if file not in manifests:
            raise UserError(f"{manifests[0]}: compiled for {manifests[0].stem}, which is not {file.stem}; {REMEDY}")
        return _checked(file, described)
    except UserError as error:
        warn_unused(error)
        return None


def warn_unused(error: Exception) -> None:
    """The one line about a compiled prediction that is not used."""
    reason = " ".join(str(error).split())
    warnings.warn(f"{reason}; predicting without the compiled package", stacklevel=2)


def _checked(file: Path, described: Mapping[str, Any]) -> Packages:
    """The packages of a manifest. Raises UserError if it is damaged, does not fit, or is not to be trusted."""
    record = read_json(file, REMEDY)
    for key, value in described.items():
        recorded = record.get(key)
        fits = _covers(value, recorded) if key == "device" else recorded == value
        if not fits:
            raise UserError(f"{file}: compiled for {_difference(key, recorded, value)}; {REMEDY}")
    try:
        files = {int(size): (file.with_name(x["file"]), x["sha256"]) for size, x in record["packages"].items()}
        dtype = str(record["dtype"])
        sound = all(size > 0 and path.parent == file.parent and isinstance(s, str) for size, (path, s) in files.items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); {REMEDY}") from error
    if not sound or not files:
        raise UserError(f"{file} is damaged; {REMEDY}")
    if not trusts_runs() and not {sha256 for _, sha256 in files.values()} <= own_files():
        raise UserError(
            f"{file}: these packages are native code that was not compiled by you; if you trust them, add --trust "
            "(Python: trust=True), else run `uvim-fsq compile` yourself, or delete the folder"
        )
    return Packages(files, dtype)


def _covers(here: Mapping[str, Any], recorded: Any) -> bool:
    """Whether this device can run code for the recorded one. More instructions than then do no harm."""
    if not isinstance(recorded, dict) or not isinstance(recorded.get("instructions"), list):
        return False
    same = all(recorded.get(key) == here[key] for key in ("type", "name", "capability"))
    return same and set(map(str, recorded["instructions"])) <= set(here["instructions"])


def _difference(key: str, recorded: Any, here: Any) -> str:
    if key == "checkpoint":
        return "another checkpoint"
    if key == "device":
        return "a device with other instructions"
    if key == "settings" and isinstance(recorded, dict):
        changed = [
            f"eval.{name}={recorded.get(name)} (now {here[name]})" for name in here if recorded.get(name) != here[name]
        ]
        return ", ".join(changed) or "other settings"
    return f"{key} {recorded} (now {here})"


def checked_package(file: Path, sha256: str) -> Path:
    """The package, if it is whole. Raises UserError if it is missing or damaged."""
    try:
        found = file_hash(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {REMEDY}") from error
    if found != sha256:
        raise UserError(f"{file} is damaged (its SHA-256 is not the one in the manifest); {REMEDY}")
    return file


def own_files() -> set[str]:
    """The SHA-256 of the packages that this user compiled, and of the programs that this user exported."""
    file = cache_dir() / OWN_PACKAGES
    if not (owned_by_user(file.parent) and owned_by_user(file)):
        return set()
    try:
        return set(file.read_text().split())
    except (OSError, ValueError):
        return set()


def add_own_files(sums: set[str]) -> None:
    """Records files as this user's own, by SHA-256."""
    file = cache_dir() / OWN_PACKAGES
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(file, "\n".join(sorted(own_files() | sums)) + "\n")
    os.chmod(file, 0o600)
