"""What this package asks of a Hugging Face hub: a repository's files at a commit, one file, and errors in one line.

The client is huggingface_hub, imported when it is needed. $HF_ENDPOINT names another hub, $HF_TOKEN a token,
HF_HUB_OFFLINE=1 forbids the network. Nothing in a repository is ever run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvim_fsq.checkpoints.layout import file_hash
from uvim_fsq.console import on_terminal
from uvim_fsq.errors import UserError
from uvim_fsq.files import disk_is_full

#: Seconds to wait for the list of files.
TIMEOUT = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Unreachable(UserError):
    """The hub cannot be reached, or the network is forbidden."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit.

    Attributes:
        size: in bytes.
        sha256: of a large file (LFS).
        git_sha1: of any other file, the object id that git gives its content.
    """

    size: int
    sha256: str | None
    git_sha1: str | None

    def matches(self, file: Path) -> bool:
        """Whether a local file has this size and hash."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return file_hash(file) == self.sha256
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        digest.update(file.read_bytes())
        return digest.hexdigest() == self.git_sha1


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which always means the same files."""
    return _COMMIT.fullmatch(revision) is not None


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def api(token: str | None = None) -> Any:
    """A client of the hub; by default with the user's token, if there is one."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token)


def list_files(repo: str, revision: str) -> tuple[str, dict[str, RemoteFile | None]]:
    """The commit that a revision means now, and the files of the repository there.

    A file is None if the hub does not say its size and hash.

    Raises UserError for an unknown repository or revision, `Unreachable` if there is no connection.
    """
    with hub_errors(f"hub:{repo}@{revision}"):
        info = api().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    if not isinstance(info.sha, str) or not is_commit(info.sha):
        raise UserError(f"hub:{repo}@{revision}: {endpoint()} does not name the commit; is it a Hugging Face hub?")
    if is_commit(revision) and info.sha != revision:
        raise UserError(f"hub:{repo}@{revision}: {endpoint()} answers with another commit, {info.sha}; use another hub")
    return info.sha, {str(sibling.rfilename): _remote_file(sibling) for sibling in info.siblings or ()}


def _remote_file(sibling: Any) -> RemoteFile | None:
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
    if type(sibling.size) is not int or sibling.size < 0 or not isinstance(sha256 or sibling.blob_id, str):
        return None
    return RemoteFile(sibling.size, sha256, None if sha256 else sibling.blob_id)


def download(repo: str, commit: str, name: str, folder: Path) -> None:
    """Downloads one file to `folder`/`name`, continuing an interrupted download of it.

    Raises UserError if it cannot be fetched, and OSError if it cannot be written.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(f"hub:{repo}@{commit}, {name}"):
        hf_hub_download(repo, name, revision=commit, local_dir=folder, endpoint=endpoint())


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Converts the errors of the hub's client inside into a UserError of one line that begins with `what`.

    A full disk stays what it is. The client's progress bars are shown on a terminal only.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    if not on_terminal() and not are_progress_bars_disabled():
        disable_progress_bars()  # they would fill logs
    token = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: its authors ask you to accept conditions first, on its web page; then {token}") from (
            error
        )
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: no such repository on {endpoint()}, or it is private and the token gives no access; {token}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the repository has no such branch, tag or commit; see its history") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(f"{what}: not on this machine yet, and HF_HUB_OFFLINE forbids to fetch it; unset it") from (
            error
        )
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(what, error, token)) from error
    except Exception as error:
        if _is_connection(error):
            raise Unreachable(
                f"{what}: {endpoint()} cannot be reached, or broke off ({_reason(error)}); check the connection and "
                "run the same command again, which continues"
            ) from error
        if disk_is_full(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise UserError(f"{what}: {_reason(error)}; run the same command again") from error


def _is_connection(error: Exception) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    # By name, because versions of the client use different HTTP libraries.
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) or "TransportError" in names


def _refusal(what: str, error: Any, token: str) -> str:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return f"{what}: {endpoint()} wants a valid token; {token}"
    if status == 403:
        return f"{what}: the token does not allow this; use one that does ({token})"
    return f"{what}: {endpoint()} refused ({_reason(error)}); try again later"


def _reason(error: BaseException) -> str:
    """The message of an error, or of what caused it, in at most 160 characters."""
    cause = error.__cause__ or error
    return " ".join((str(cause) or type(cause).__name__).split())[:160]
