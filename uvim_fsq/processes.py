"""The processes of a distributed run: their number, their devices, and how they communicate.

The only module that creates Accelerate's state. Independent of training.
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
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from uvim_fsq.errors import UserError

if TYPE_CHECKING:  # a Predictor on a CPU does without Accelerate
    from accelerate.state import PartialState

#: How long a process waits for the others within a training step. Longer than the loader's timeout for a batch
#: (data/loader.py), so that the process that is stuck reports first.
STEP_TIMEOUT = timedelta(minutes=15)
#: How long it waits while only one process works: evaluation, checkpoints, figures.
WAIT_TIMEOUT = timedelta(hours=4)
#: Parallelism that Accelerate would enable by itself from variables that `accelerate launch` sets, but that this
#: package does not support.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}

T = TypeVar("T")
_group: dist.ProcessGroup | None = None


def state() -> PartialState:
    """Accelerate's state: the number of processes, this one's rank and its device.

    The first call joins the processes, so every process must make it.

    Raises UserError if a launcher asks for unsupported parallelism (`UNSUPPORTED`), if the processes cannot connect, or
    if the launcher's environment variables are incomplete.
    """
    global _group
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"{variable}=true: {name} is not supported, every process holds the whole model (DDP); "
                "run `accelerate config` again without it, or unset the variable"
            )
    try:
        with _default_signal_handlers():
            found = PartialState(cpu=_on_cpu(), timeout=STEP_TIMEOUT)
            if found.num_processes > 1 and _group is None:
                _group = _gloo_group()
    except RuntimeError as error:
        if _world_size() == 1:
            raise
        raise UserError(
            f"the {_world_size()} processes cannot connect to each other ({str(error).splitlines()[0]}); if machines "
            "have several networks, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    except ValueError as error:
        # Only some of a launcher's variables are set, e.g. left over in the shell.
        if _world_size() == 1 and "LOCAL_RANK" not in os.environ:
            raise
        raise UserError(
            f"WORLD_SIZE or LOCAL_RANK is set, but other launcher variables are missing "
            f"({str(error).splitlines()[0]}); start with `accelerate launch` or `torchrun`, or unset both"
        ) from error
    if found.num_processes != _world_size():
        raise UserError(
            f"WORLD_SIZE={_world_size()}, but this process finds {found.num_processes}; start with `accelerate launch` "
            "or `torchrun`, which set LOCAL_RANK, or unset WORLD_SIZE"
        )
    return found


@contextmanager
def _default_signal_handlers() -> Iterator[None]:
    """While the processes connect, SIGINT and SIGTERM kill at once: Python's handlers would never get to run.

    Once they are connected, handlers stay: training calls `state` often, and a signal must not lose its progress.
    """
    connecting = _world_size() > 1 and _group is None and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if connecting else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gloo_group() -> dist.ProcessGroup:
    """A Gloo group, on any device: it waits on the host, and notices at once when another process has exited."""
    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _world_size() -> int:
    """$WORLD_SIZE, by default 1. Raises UserError if it is not a number."""
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal():
        raise UserError(f"WORLD_SIZE={value} is not a number of processes; unset it, or start with a launcher")
    return int(value)


def _on_cpu() -> bool:
    """Whether to pass cpu=True to Accelerate. Without it, it ignores a launcher's processes on a CPU-only machine."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    if "LOCAL_RANK" not in os.environ:
        return False
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def _alone_on_cpu() -> bool:
    """Whether no launcher started this process and there is no GPU, so that Accelerate need not be asked."""
    launched = any(name.startswith("ACCELERATE_") or name in ("LOCAL_RANK", "WORLD_SIZE") for name in os.environ)
    return not launched and _group is None and torch.accelerator.current_accelerator(check_available=True) is None


def device() -> torch.device:
    """The device of this process."""
    if _alone_on_cpu():
        return torch.device("cpu")
    return torch.device(state().device or "cpu")


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return bool(state().is_main_process)


def gather(value: T) -> list[T]:
    """The `value` of every process, in rank order, on every process. `value` must be picklable."""
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
    """Raises UserError if `value`, e.g. the hash of what was loaded from `place`, differs between processes."""
    values = gather(value)
    if values.count(values[0]) != len(values):
        raise UserError(
            f"the processes loaded different checkpoints from {place}; put the run directory and the oracle's on a "
            "file system that all machines share"
        )


def wait() -> None:
    """A barrier. Never call it in a `finally`: a process that raises must exit, not wait."""
    if state().num_processes > 1:
        dist.barrier(group=_group)


class Agreement:
    """A logical OR over the processes, asked after every step and answered one step later, so that none waits."""

    def __init__(self) -> None:
        self.alone = state().num_processes == 1
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process set it in the previous call; in this call if there is only one process.

        All processes must call it equally often, and all get the same answer.
        """
        if self.alone:
            return list(flags)
        answer = [False] * len(flags)
        if self._asked is not None:
            work, reduced = self._asked
            work.wait()
            answer = reduced.bool().tolist()
        reduced = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(reduced, dist.ReduceOp.MAX, group=_group, async_op=True)
        assert work is not None
        self._asked = work, reduced
        return answer


def _peer_failure(error: BaseException) -> str | None:
    """The message for an error that only means that another process has exited or hangs; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(name in text for name in ("gloo", "NCCL", "Connection closed by peer"))
    ):
        return None
    if "imed out" in text or "timeout" in text:
        return "another process does not respond; see its own message, if any"
    return "another process has exited; see its own message"


def part() -> None:
    """Leaves the process group, all processes at the same time, as NCCL requires."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def end_at_once(error: BaseException) -> None:
    """Exits at once after an error if this is one of several processes: a normal exit would wait for the others.

    The launcher then stops the others. A process that fails only because this one is gone prints one line.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif (message := _peer_failure(error)) is not None:
        print(f"stopped: {message}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
