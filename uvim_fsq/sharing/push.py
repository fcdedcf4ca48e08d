"""Uploads a run to a Hugging Face hub, as one commit, or writes what would be uploaded to a folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from uvim_fsq.checkpoints.hub import LIMITS, PREFIX, parse
from uvim_fsq.checkpoints.hub_client import api, hub_errors
from uvim_fsq.checkpoints.layout import SUMS
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole, writing
from uvim_fsq.sharing.bundle import CARD, Bundle, make_bundle
from uvim_fsq.sharing.card import model_card

#: Files of a new repository, which may be there before the first upload.
_OF_NEW = {".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"}


def check_request(repo: str, license_id: str | None) -> None:
    """Raises UserError for a repository or license that has no proper name."""
    if parse(f"{PREFIX}{repo}").repo != repo:
        raise UserError(f"{repo}: give the repository as OWNER/NAME; it is uploaded to its branch main")
    if license_id is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", license_id) is None:
        raise UserError(
            f"--license {license_id[:60]!r}: give an identifier such as apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def push(path: str | Path, repo: str, *, license_id: str | None = None, private: bool = False) -> str:
    """Uploads the checkpoint of a run with its model card to the branch main of a repository, which is made if needed.

    Args:
        path: a run, whose checkpoint is chosen as everywhere, or a checkpoint directory.
        repo: OWNER/NAME.
        license_id: the license's identifier on the hub, for the model card.
        private: whether a new repository is private; an existing one stays as it is.

    Returns `hub:OWNER/NAME@COMMIT`. Raises UserError if the run is incomplete, without a token, and if the repository
    holds something else or cannot be written.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    check_request(repo, license_id)
    if not get_token():
        raise UserError("push needs a token of the hub that may write: log in with `hf auth login`, or set HF_TOKEN")
    files = _with_card(make_bundle(path), repo, license_id)
    client = api()
    with hub_errors(f"push to {repo}"):
        client.create_repo(repo, private=private or None, exist_ok=True)
        present = {sibling.rfilename for sibling in client.model_info(repo, revision="main").siblings or ()}
        other = sorted(present - LIMITS.keys() - _OF_NEW)
        if other and SUMS not in present:
            raise UserError(f"push to {repo}: it holds something else already ({other[0][:60]}); give another name")
        stale = [CommitOperationDelete(name) for name in sorted(present & (LIMITS.keys() - files.keys()))]
        added = [CommitOperationAdd(name, value) for name, value in files.items()]
        info = client.create_commit(repo, [*added, *stale], commit_message="Upload by uvim-fsq push", revision="main")
    return f"{PREFIX}{repo}@{info.oid}"


def write_folder(path: str | Path, repo: str, folder: Path, *, license_id: str | None = None) -> None:
    """Writes what `push` would upload to a new or empty folder. Raises UserError like `push`, but needs no token."""
    check_request(repo, license_id)
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--folder {folder} is there already and not an empty folder; give another one")
    for name, value in _with_card(make_bundle(path), repo, license_id).items():
        _write(folder / name, value)


def _write(file: Path, value: Path | bytes) -> None:
    if isinstance(value, bytes):
        write_whole(file, lambda place: place.write_bytes(value))
    else:
        write_whole(file, lambda place: shutil.copyfile(value, place))


def _with_card(bundle: Bundle, repo: str, license_id: str | None) -> dict[str, Path | bytes]:
    return {**bundle.files, CARD: model_card(bundle, repo, license_id).encode()}
