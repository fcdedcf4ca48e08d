"""The processes of a run, one or many: how many there are, where each computes, and how they wait for each other.

The one place that makes Accelerate's state. Knows nothing of training.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env

from uvim_fsq.errors import UserError

#: How long a process waits for the others inside a training step. Longer than a batch may take (data/loader.py), so
#: that the process that is stuck speaks first.
STEP_TIMEOUT = timedelta(minutes=15)
#: How long it waits where one process works and the others have nothing to do: evaluation, checkpoints, pictures.
WAIT_TIMEOUT = timedelta(hours=4)
#: What Accelerate would switch on by itself, from the variables that `accelerate launch` sets.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}

T = TypeVar("T")
_group: dist.ProcessGroup | None = None


def state() -> PartialState:
    """How many processes there are, which one this is, and its device. The first call joins them, so all must make it.

    Raises UserError for ways of training that Accelerate has and this project has not, and where several processes
    cannot join or a launcher does not say how.
    """
    global _group
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"{variable}=true: {name} is not supported, each process holds the whole model (DDP); "
                "run `accelerate config` again without it, or unset the variable"
            )
    try:
        with _signals_kill():
            found = PartialState(cpu=_on_cpu(), timeout=STEP_TIMEOUT)
            if found.num_processes > 1 and _group is None:
                _group = _waiting_group()
    except RuntimeError as error:
        if _announced() == 1:
            raise
        raise UserError(
            f"the {_announced()} processes cannot join each other ({str(error).splitlines()[0]}); where machines have "
            "several networks, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    except ValueError as error:
        # Some of a launcher's variables without the others, e.g. left in the shell.
        if _announced() == 1 and "LOCAL_RANK" not in os.environ:
            raise
        raise UserError(
            f"WORLD_SIZE or LOCAL_RANK is set, but not all that a launcher sets ({str(error).splitlines()[0]}); start "
            "with `accelerate launch` or `torchrun`, or unset both"
        ) from error
    if found.num_processes != _announced():
        raise UserError(
            f"WORLD_SIZE={_announced()}, but this process finds {found.num_processes}; start with `accelerate launch` "
            "or `torchrun`, which set LOCAL_RANK, or unset WORLD_SIZE"
        )
    return found


@contextmanager
def _signals_kill() -> Iterator[None]:
    """Inside, both signals kill at once: while processes wait to be joined, Python's own handlers are never run.

    Not once they are joined: training asks again and again, and a signal must not cost what it has learned.
    """
    waits = _announced() > 1 and _group is None and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if waits else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waiting_group() -> dist.ProcessGroup:
    """Gloo on any device: it waits on the host, and it notices at once when another process has ended."""
    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _announced() -> int:
    """How many processes the launcher says there are. Raises UserError for what is no number."""
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal():
        raise UserError(f"WORLD_SIZE={said} is no number of processes; unset it, or start with a launcher")
    return int(said)


def _on_cpu() -> bool:
    """Accelerate counts processes that share no accelerator only if it is told that they are on CPUs."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    if "LOCAL_RANK" not in os.environ:
        return False
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def device() -> torch.device:
    """Where this process computes."""
    return torch.device(state().device or "cpu")


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return bool(state().is_main_process)


def gather(value: T) -> list[T]:
    """The `value` of every process, in their order, on every process. Waits for the slowest."""
    count = state().num_processes
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    dist.all_gather_object(values, value, group=_group)
    return values  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """The main process's `value`, on every process."""
    return gather(value)[0]


def same(value: object, place: object) -> None:
    """Raises UserError where `value`, e.g. the hash of what was loaded from `place`, differs between processes."""
    everyone = gather(value)
    if everyone.count(everyone[0]) != len(everyone):
        raise UserError(
            f"the processes loaded different checkpoints from {place}; the run directory and the oracle's must be ones "
            "that all machines share"
        )


def wait() -> None:
    """Waits until every process is here. Never in a `finally`: a process under an exception must end."""
    if state().num_processes > 1:
        dist.barrier(group=_group)


class Agreement:
    """Whether any process says yes, asked after every step and answered one step later, so that nobody waits."""

    def __init__(self) -> None:
        self.alone = state().num_processes == 1
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, *mine: bool) -> list[bool]:
        """For each question whether any process said yes at the call before this one; alone: at this one.

        All processes must call it equally often; all get the same answer.
        """
        if self.alone:
            return list(mine)
        answer = [False] * len(mine)
        if self._asked is not None:
            work, flags = self._asked
            work.wait()
            answer = flags.bool().tolist()
        flags = torch.tensor(mine, dtype=torch.int32)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=_group, async_op=True)
        assert work is not None
        self._asked = work, flags
        return answer


def _other_failed(error: BaseException) -> str | None:
    """What to say of an error that only means that another process has ended or hangs; None for any other error."""
    words = str(error)
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(name in words for name in ("gloo", "NCCL", "Connection closed by peer"))
    ):
        return None
    if "imed out" in words or "timeout" in words:
        return "another process does not answer; its own message, if any, says why"
    return "another process has ended; its own message says why"


def part() -> None:
    """Leaves the others in good order, and all at one time, as NCCL wants it."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def end_at_once(error: BaseException) -> None:
    """Ends this process after an error if it is one of several: an orderly end would wait for the others.

    The launcher then ends the others. One of them that fails only because this one has gone says so in one line.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif (other := _other_failed(error)) is not None:
        print(f"stopped: {other}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
