"""What the processes of one run must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from uvim_fsq.errors import UserError

T = TypeVar("T")


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, given to all of them. A UserError there is raised in all of them."""
    said: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            said[0] = work()
        except UserError as error:
            said[1] = str(error)
    if PartialState().num_processes > 1:
        broadcast_object_list(said)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def agreed(work: Callable[[], T], what: str) -> T:
    """What `work` returns in every process.

    Raises UserError in all of them, naming the process, where it fails in one or gives another result than in the
    main one; `what` says what differs.
    """
    result: Any = None
    problem = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    everyone: list[Any] = gather_object([(result, problem)])
    for rank, (other, trouble) in enumerate(everyone):
        where = f"process {rank} of {len(everyone)}: " if len(everyone) > 1 else ""
        if trouble is not None:
            raise UserError(f"{where}{trouble}")
        if other != everyone[0][0]:
            raise UserError(f"{where}{what}; the run directory must be one that all machines share")
    return result
