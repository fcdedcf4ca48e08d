"""Time and memory from the start of Python to the first prediction, each stage in processes of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from uvim_fsq.config.plugins import environment
from uvim_fsq.errors import UserError
from uvim_fsq.performance.timing import Measurement, Timing, milliseconds

#: Stage -> the code that it adds to that of the stages before. `arguments` holds the run, a picture and the overrides.
STAGES = {
    "Python itself": "",
    "import uvim_fsq": "import uvim_fsq",
    "from uvim_fsq import Predictor": "from uvim_fsq import Predictor",
    "Predictor.from_run": "predictor = Predictor.from_run(arguments[0], arguments[2:])",
    "the first prediction": "predictor.predict(arguments[1])",
}
#: Of `STAGES`, those that need no run.
WITHOUT_RUN = 3
#: Prints the largest memory of the process, in bytes. On Linux getrusage also counts what the process shared with its
#: parent before it became Python; on macOS it counts bytes.
PEAK = """
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
except (OSError, StopIteration):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print("PEAK", peak)
"""


def measure_start_up(run: Path | None, overrides: Sequence[str], picture: Path, *, repeats: int) -> list[Measurement]:
    """Milliseconds from the start of a process to the end of each stage, and its largest memory so far, in MB.

    Each repeat of a stage is a new process, which also does the stages before it. The stages take turns. The files are
    in the page cache after a first turn that does not count.

    Args:
        run: a run directory; None measures imports alone.
        overrides: `key=value` strings for the run.
        picture: the file of the first prediction.
        repeats: processes per stage.

    Raises UserError if a process fails.
    """
    names = list(STAGES)[: None if run is not None else WITHOUT_RUN]
    arguments = [str(run), str(picture), *overrides]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names:
            taken, peak = _process(_code(name), arguments)
            if turn:
                seconds[name].append(taken)
                peaks[name].append(peak)
    lines: list[Measurement] = []
    for name in names:
        megabytes = [peak / 1e6 for peak in peaks[name]]
        median = statistics.median(megabytes)
        spread = (max(megabytes) - min(megabytes)) / median
        lines.append(milliseconds(f"start-up: {name}", Timing(tuple(seconds[name]))))
        lines.append(Measurement(f"start-up: {name}, memory", median, "MB", spread))
    return lines


def _code(stage: str) -> str:
    names = list(STAGES)
    stages = [STAGES[name] for name in names[: names.index(stage) + 1]]
    start, end = "import json, sys\narguments = json.loads(sys.argv[1])", "print('DONE', flush=True)"
    return "\n".join([start, *stages, end, PEAK])


def _process(code: str, arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds from the start of a process until it prints DONE, and its largest memory in bytes."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    start, reached = time.perf_counter(), 0.0
    last = ""
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "DONE\n":
                    reached = time.perf_counter() - start
                last = line
        errors.seek(0)
        said = errors.read().strip()
    if process.returncode or not reached or not last.startswith("PEAK "):
        reason = said.splitlines()[-1] if said else f"exit code {process.returncode}"
        raise UserError(f"benchmark start-up: a process failed ({reason[:300]}); uvim-fsq predict shows more")
    return reached, int(last.split()[1])
