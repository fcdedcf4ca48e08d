"""Runs on a hub: `hub:OWNER/NAME@REVISION` in place of a run directory. Independent of tasks; does not import torch.

A repository is one checkpoint directory (an LM's with its oracle in `oracle/`), as `uvim-fsq push` uploads it. Only
the files that such a directory has are fetched, into $UVIM_FSQ_CACHE/hub/OWNER/NAME/COMMIT, where they are never
changed. Names, sizes and hashes are checked before anything reads them, and nothing of a repository is run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from uvim_fsq.checkpoints.hub_client import RemoteFile, Unreachable, download, endpoint, is_commit, list_files
from uvim_fsq.checkpoints.layout import CONFIG, DECODING, ORACLE, SUMS, WEIGHTS, file_hash
from uvim_fsq.config.yaml_files import read_tree
from uvim_fsq.console import say
from uvim_fsq.data.cache import cache_dir, owned_by_user
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json, write_json, writing

PREFIX = "hub:"
#: The figures of the uploaded checkpoint, as `uvim-fsq evaluate` wrote them.
RESULTS = "results.json"
#: What is fetched, with the largest size in bytes that is accepted.
LIMITS = {
    CONFIG: 1 << 20,
    SUMS: 1 << 16,
    WEIGHTS: 50_000_000_000,
    DECODING: 1 << 24,
    RESULTS: 1 << 26,
    f"{ORACLE}/{CONFIG}": 1 << 20,
    f"{ORACLE}/{SUMS}": 1 << 16,
    f"{ORACLE}/{WEIGHTS}": 50_000_000_000,
}
REQUIRED = (CONFIG, SUMS, WEIGHTS)
OF_ORACLE = tuple(f"{ORACLE}/{name}" for name in REQUIRED)
#: The record of a download: where from, which commit, size and SHA-256 of each file.
RECORD = "download.json"
#: The commits that branches and tags meant when they were last looked up.
REFS = "refs.json"
_WORD = r"[A-Za-z0-9][\w.-]{0,95}"
_PATTERN = re.compile(rf"hub:({_WORD})/({_WORD})(?:@([A-Za-z0-9][\w./-]{{0,199}}))?", re.ASCII)
#: (cache folder, hub, repository, revision) -> directory. A branch means one commit for the whole process.
_found: dict[tuple[Path, str, str, str], Path] = {}


class HubRun(NamedTuple):
    """What `hub:OWNER/NAME@REVISION` says. The revision is a branch, a tag or a commit, by default `main`."""

    owner: str
    name: str
    revision: str

    @property
    def repo(self) -> str:
        """OWNER/NAME."""
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}"


def is_hub(path: str | Path) -> bool:
    """Whether a run argument names a run on a hub."""
    return str(path).startswith(PREFIX)


def parse(path: str | Path) -> HubRun:
    """Reads `hub:OWNER/NAME@REVISION`. Raises UserError for anything else."""
    found = _PATTERN.fullmatch(str(path))
    if found is None or ".." in str(path) or "//" in str(path):
        raise UserError(
            f"{str(path)[:100]!r} is not of the form hub:OWNER/NAME@REVISION, where the revision is a branch, tag or "
            "commit (default: main)"
        )
    return HubRun(found[1], found[2], found[3] or "main")


def local_run(path: str | Path) -> Path:
    """The directory of a run argument: the path itself, or of a run on a hub its copy, which is downloaded if needed.

    Raises UserError if it cannot be downloaded, is not an upload of this package, or is damaged.
    """
    if not is_hub(path):
        return Path(path)
    run = parse(path)
    key = (_root(), endpoint(), run.repo, run.revision)
    if key not in _found or not _found[key].is_dir():
        _found[key] = _fetch(run)
    return _found[key]


def provenance_name(path: Path) -> str:
    """How results name a checkpoint directory: `hub:OWNER/NAME@COMMIT` if it was downloaded, else its path."""
    place = _cached(path)
    if place is None:
        return str(path)
    owner, name, commit, *rest = place.parts
    return "/".join([f"{PREFIX}{owner}/{name}@{commit}", *rest])


def results_folder(run: str | Path) -> Path:
    """Where results about a run go: the run directory, or for a downloaded one runs/hub/OWNER/NAME/COMMIT."""
    place = _cached(local_run(run))
    return Path(run) if place is None else Path("runs", "hub", *place.parts[:2], place.parts[2][:12])


def refuse_downloaded(run: str | Path, what: str) -> None:
    """Raises UserError if a run was downloaded. `what`: what would change it, e.g. "tune writes into the run"."""
    folder = local_run(run)
    if _cached(folder) is not None:
        raise UserError(
            f"{run} comes from a hub and is read-only, but {what}; copy it first, `cp -r {folder} runs/COPY`, and give "
            "the copy"
        )


def _root() -> Path:
    return cache_dir() / "hub"


def _cached(path: Path) -> Path | None:
    """OWNER/NAME/COMMIT[/...] of a path in the cache; None of any other."""
    try:
        place = path.resolve().relative_to(_root().resolve())
    except ValueError:
        return None
    return place if len(place.parts) >= 3 else None


def _fetch(run: HubRun) -> Path:
    """The directory of a run in the cache, downloaded if needed."""
    folder = _root() / run.repo
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not owned_by_user(folder):
        raise UserError(f"{folder} belongs to another user; set UVIM_FSQ_CACHE to a folder of your own")
    if is_commit(run.revision) and (folder / run.revision / RECORD).is_file():
        return _checked(folder / run.revision)
    with _locked(folder):
        try:
            commit, files = list_files(run.repo, run.revision)
        except Unreachable as error:
            known = folder / str(_refs(folder).get(run.revision, "-"))
            if not (known / RECORD).is_file():
                raise
            say(f"{run}: taken as commit {known.name}, as at the last download ({error})")
            return _checked(known)
        target = folder / commit
        if not (target / RECORD).is_file():
            _download(run, target, _wanted(run, files))
        if commit != run.revision:
            write_json(folder / REFS, {**_refs(folder), run.revision: commit})
            say(f"{run} is commit {commit}; hub:{run.repo}@{commit} stays with it")
    return _checked(target)


def _refs(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / REFS, "delete it")
    except FileNotFoundError:
        return {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time download into `folder`; the others wait. File systems without locks are tolerated."""
    with writing(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _wanted(run: HubRun, files: dict[str, RemoteFile | None]) -> dict[str, RemoteFile]:
    """The files to fetch. Raises UserError for a repository with names that are no plain paths, missing or too large
    files.
    """
    for name in files:
        if not _is_plain(name):
            raise UserError(f"{run}: it lists a file named {name[:60]!r}, which leads out of its folder; do not use it")
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise UserError(f"{run} has no {missing[0]}: it was not uploaded by `uvim-fsq push`; give another repository")
    if any(name in files for name in OF_ORACLE):
        missing = [name for name in OF_ORACLE if name not in files]
        if missing:
            raise UserError(f"{run} has no {missing[0]}: its oracle is incomplete; ask its author to push it again")
    wanted: dict[str, RemoteFile] = {}
    for name, limit in LIMITS.items():
        if name not in files:
            continue
        remote = files[name]
        if remote is None:
            raise UserError(f"{run}: {endpoint()} does not tell size and hash of {name}; is it a Hugging Face hub?")
        if remote.size > limit:
            raise UserError(f"{run}: {name} has {remote.size} bytes, more than such a file can have ({limit})")
        wanted[name] = remote
    return wanted


def _is_plain(name: str) -> bool:
    """Whether a file's name is a relative path that stays in its folder, on any system."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts:
        return False
    return not name.startswith(("/", "~")) and "\\" not in name and name.isprintable()


def _download(run: HubRun, target: Path, files: dict[str, RemoteFile]) -> None:
    """Fetches files, checks them and puts them in place together. What an interruption left is continued."""
    staging = target.with_name(f".tmp_{target.name}")
    total = sum(remote.size for remote in files.values())
    with writing(staging):
        staging.mkdir(exist_ok=True)
        present = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        free = shutil.disk_usage(staging).free
        if free < total - present:
            raise UserError(
                f"{run} takes {total / 1e9:.2f} GB, but {target.parent} has {free / 1e9:.2f} GB left; free space, or "
                "set UVIM_FSQ_CACHE to a folder on another disk"
            )
        say(f"{run}: downloading {total / 1e6:,.1f} MB into {target}")
        weights = {name for name in files if name.endswith(WEIGHTS)}
        for names in (files.keys() - weights, weights):
            for name in names:
                if not files[name].matches(staging / name):
                    download(run.repo, target.name, name, staging)
                if not files[name].matches(staging / name):
                    (staging / name).unlink(missing_ok=True)
                    raise UserError(f"{run}: {name} arrived damaged, its hash differs; run the same command again")
            _check_content(run, staging)  # before gigabytes of weights are fetched
        shutil.rmtree(staging / ".cache", ignore_errors=True)
        record = {name: {"size": remote.size, "sha256": file_hash(staging / name)} for name, remote in files.items()}
        about = {"hub": endpoint(), "repository": run.repo, "revision": run.revision, "commit": target.name}
        write_json(staging / RECORD, {**about, "files": record})
        for name in (*files, RECORD):
            (staging / name).chmod(0o444)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)


def _check_content(run: HubRun, folder: Path) -> None:
    """Raises UserError for an LM without oracle, and for configurations that refer to files outside the run."""
    for place in (folder, folder / ORACLE):
        if not place.is_dir():
            continue
        tree = read_tree(place / CONFIG)
        if place == folder and tree.get("stage") == "lm" and not (folder / ORACLE).is_dir():
            raise UserError(f"{run} is an LM without its oracle (folder {ORACLE}/); ask its author to push it again")
        for key, value in _strings(tree):
            if leads_outside(value):
                raise UserError(
                    f"{run}: {key} in its {CONFIG} is {value[:60]!r}, a place on its author's machine; ask the author "
                    "to upload it with `uvim-fsq push`, which removes such paths"
                )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts in a tree."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value


def leads_outside(text: str) -> bool:
    """Whether a text is a path that is absolute, starts at a home folder, or climbs up."""
    windows = PureWindowsPath(text)
    return text.startswith(("/", "~")) or bool(windows.drive or windows.root) or ".." in windows.parts


def _checked(folder: Path) -> Path:
    """`folder`, if its files have the recorded sizes, and all but the weights their hashes.

    The weights are compared with the hash in sha256.json whenever they are loaded. Raises UserError otherwise.
    """
    remedy = f"delete {folder}, and it is downloaded again"
    files = read_json(folder / RECORD, remedy).get("files")
    if not isinstance(files, dict) or not all(isinstance(about, dict) for about in files.values()):
        raise UserError(f"{folder / RECORD} is damaged; {remedy}")
    for name, about in files.items():
        file = folder / name
        sound = name in LIMITS and file.is_file() and file.stat().st_size == about.get("size")
        if not sound or (not name.endswith(WEIGHTS) and file_hash(file) != about.get("sha256")):
            raise UserError(f"{file} is not as it was downloaded; {remedy}")
    return folder
