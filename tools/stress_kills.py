"""Kills small training runs at random times and resumes them: python tools/stress_kills.py --kills 20

For each stage, one run is not interrupted. In each trial the same run is killed once with SIGKILL, at any time between
start and end, also during evaluation, and then resumed. Weights, log lines, best checkpoint and final evaluation must
equal those of the uninterrupted run bit for bit. Needs Linux; exits with code 1 if a trial differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.checkpoints.run_directory import best
from uvim_fsq.cli import main as cli
from uvim_fsq.synthetic.writers import write_dataset

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "nyu_depth"
SMALL = (
    "data.image_size=16",
    "data.train_split=train_minus_holdout",
    "data.selection_split=holdout",
    "data.cache=false",
)
MODEL = {
    "oracle": ("model.width=16", "model.num_heads=2", "model.mlp_dim=32", "model.code_length=4"),
    "lm": ("model.encoder.width=16", "model.encoder.num_heads=2", "model.encoder.depth=1", "model.width=16"),
}
TRAINING = (
    "train.steps=24",
    "train.batch_size=8",
    "train.log_every=1",
    "train.save_every=2",
    "train.eval_every=3",
    "train.keep=2",
    "train.ema=0.9",
    "train.resume=auto",
    "optim.warmup_steps=2",
    "optim.name=adafactor",
)
#: Logged values that depend on speed and therefore differ between runs.
TIMED = ("images_per_second", "mfu", "data_wait")


def start(arguments: Sequence[str], log: Path) -> int:
    """Runs `uvim-fsq` in a forked process, which needs no imports; returns its process ID."""
    child = os.fork()
    if child:
        return child
    code = 1
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            cli(arguments)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def finish(child: int) -> int:
    """Waits for a child process and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(run: Path) -> dict[str, Any]:
    """Everything in a run directory that must not depend on interruptions."""
    found: dict[str, Any] = {}
    for file in sorted(run.glob("checkpoints/step_*/model.safetensors")):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    for file in sorted(run.glob("checkpoints/step_*/evaluation.json")):
        found[str(file.relative_to(run))] = json.loads(file.read_text())
    chosen = best(run)
    found["best"] = chosen[0].name if chosen is not None else None
    found["figures"] = json.loads((run / "evaluation.json").read_text())["figures"]
    found["panels"] = sorted(file.name for file in (run / "panels").glob("*.png"))
    return found


def trial(command: Sequence[str], folder: Path, seconds: float) -> tuple[Path, bool]:
    """A run that is killed after `seconds` and resumed, and whether the kill came before its end."""
    run, log = folder / "killed", folder / "killed.log"
    shutil.rmtree(run, ignore_errors=True)
    child = start([*command, f"train.out={run}"], log)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    killed = finish(child) == -signal.SIGKILL
    code = finish(start([*command, f"train.out={run}"], log))
    if code:
        print(f"the resumed run ended with exit code {code}; the end of its log:\n{log.read_text()[-2000:]}")
    return run, killed


def stage_trials(stage: str, command: Sequence[str], folder: Path, kills: int, chance: random.Random) -> int:
    """Runs the trials of one stage, prints a line for each, and returns the number that differ."""
    whole = folder / f"{stage}_whole"
    begin = time.perf_counter()
    if code := finish(start([*command, f"train.out={whole}"], folder / "whole.log")):
        sys.exit(f"the uninterrupted run ended with exit code {code}:\n{(folder / 'whole.log').read_text()[-2000:]}")
    length = time.perf_counter() - begin
    expected = outcome(whole)
    differ = 0
    late = 0
    for number in range(1, kills + 1):
        seconds = chance.uniform(0, length)
        run, killed = trial(command, folder, seconds)
        late += not killed
        try:
            found = outcome(run)
        except (OSError, ValueError, KeyError) as error:
            found = {"error": repr(error)}
        wrong = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        differ += bool(wrong)
        verdict = f"DIFFERS in {', '.join(wrong)}" if wrong else "identical"
        print(f"{stage} {number:3d}: kill after {seconds:5.2f} of {length:.2f} s: {verdict}", flush=True)
        if wrong:
            shutil.move(str(run), folder.parent / f"differs_{stage}_{number}_{os.getpid()}")
    print(f"{stage}: {kills - differ} of {kills} identical; {late} kills came after the end of the run")
    return differ


def main() -> None:
    """Runs the trials of both stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills per stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset("nyu", folder / "data", 120, 32, num_val=12, layout="h5", workers=1)
        common = [*SMALL, *TRAINING, f"data.root={folder / 'data'}"]
        oracle = ["train-oracle", str(CONFIGS / "small_oracle.yaml"), *MODEL["oracle"], *common]
        differ = stage_trials("oracle", oracle, folder, arguments.kills, chance)
        lm = ["train-lm", str(CONFIGS / "small_lm.yaml"), *MODEL["lm"], "model.num_heads=2", *common]
        lm.append(f"oracle={folder / 'oracle_whole'}")
        differ += stage_trials("lm", lm, folder, arguments.kills, chance)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
