"""Damages files of small runs and data sets, then uses them: python tools/stress_damage.py --trials 300

Each trial damages one file in a copy of an LM run, of its oracle's run, or of prepared data, then evaluates, resumes,
predicts or trains. (Photos are left alone, because their formats have no checksums.) A trial is "clean" if the result
is the same as with intact files, or if the command ends with a one-line error and exit code 2. It is "silent" if the
result differs without an error. Anything else is a "crash": a traceback, another exit code, or a time-out. Needs Linux;
exits with code 1 unless all trials are clean.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from os import kill
from pathlib import Path
from typing import Any

from stress_kills import CONFIGS, MODEL, SMALL, TRAINING, finish, outcome, start

from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.nyu_depth.prepared import FOLDER

DEADLINE = 300.0
KINDS = ("clean", "silent", "crash")
LOGS = ("tensorboard", "panels")


def truncated(content: bytes, chance: random.Random) -> bytes:
    """Only the beginning of the file."""
    return content[: chance.randrange(max(len(content), 1))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit flipped."""
    where = chance.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << chance.randrange(8)]) + content[where + 1 :]


def zeroed(content: bytes, chance: random.Random) -> bytes:
    """A block overwritten with zeros, as after a power failure."""
    where = chance.randrange(len(content))
    length = min(len(content) - where, 4096)
    return content[:where] + bytes(length) + content[where + length :]


def empty(content: bytes, chance: random.Random) -> bytes:
    """An empty file."""
    return b""


def garbage(content: bytes, chance: random.Random) -> bytes:
    """Random bytes of the same length."""
    return chance.randbytes(len(content))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncated, flipped, zeroed, empty, garbage)


class World:
    """The intact files, the commands that use them, and the commands' results with intact files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole, self.work = folder, folder / "whole", folder / "work"
        write_dataset("nyu", self.whole / "data", 40, 32, num_val=6, layout="png", workers=1)
        common = [*SMALL, *TRAINING, "train.eval_every=12", "train.save_every=6"]
        # All commands work on the copy, so that the paths in configurations are valid.
        shutil.copytree(self.whole, self.work)
        data = f"data.root={self.work / 'data'}"
        self.oracle = ["train-oracle", str(CONFIGS / "small_oracle.yaml"), *MODEL["oracle"], *common, data]
        self.lm = ["train-lm", str(CONFIGS / "small_lm.yaml"), *MODEL["lm"], "model.num_heads=2", *common, data]
        self.lm.append(f"oracle={self.work / 'oracle'}")
        self._must(["data", "prepare", str(self.work / "data"), "--task", "nyu_depth"])
        self._must([*self.oracle, f"train.out={self.work / 'oracle'}"])
        self._must([*self.lm, f"train.out={self.work / 'lm'}"])
        # A run that stopped half-way, to be resumed.
        self._must([*self.lm, f"train.out={self.work / 'half'}"])
        newest = sorted((self.work / "half" / "checkpoints").glob("step_*"))[-1]
        shutil.rmtree(newest)
        (self.work / "half" / "evaluation.json").unlink()
        shutil.rmtree(self.whole)
        shutil.copytree(self.work, self.whole)
        self.commands = {
            "evaluate": ["evaluate", str(self.work / "lm"), "eval.workers=0"],
            "predict": ["predict", str(self.work / "lm"), str(self.work / "data"), "--out", str(self.work / "out")],
            "resume": [*self.lm, f"train.out={self.work / 'half'}"],
            "train-lm": [*self.lm, f"train.out={self.work / 'new'}", "train.steps=4"],
        }
        self.expected = {name: self._expect(name) for name in self.commands}

    def _must(self, command: list[str]) -> None:
        log = self.folder / "log"
        if code := finish(start(command, log)):
            sys.exit(f"{' '.join(command)} ended with exit code {code}:\n{log.read_text()[-2000:]}")

    def _expect(self, name: str) -> Any:
        self.restore()
        code, result, text = self.use(name)
        if code:
            sys.exit(f"{name} with intact files ended with exit code {code}:\n{text[-2000:]}")
        return result

    def restore(self) -> None:
        """Restores the intact files in the work folder."""
        shutil.rmtree(self.work)
        shutil.copytree(self.whole, self.work)

    def files(self) -> list[list[Path]]:
        """All files that may be damaged, grouped by kind, so that rare kinds are chosen as often as frequent ones."""
        self.restore()
        kinds: dict[tuple[str, str], list[Path]] = {}
        for path in sorted(self.work.rglob("*")):
            parts = path.relative_to(self.work).parts
            if path.is_file() and not set(LOGS) & set(parts) and (parts[0] != "data" or FOLDER in parts):
                kinds.setdefault((parts[0], "h5" if path.suffix == ".h5" else path.name), []).append(path)
        return list(kinds.values())

    def use(self, name: str) -> tuple[int, Any, str]:
        """Runs a command; returns its exit code, result and output."""
        log = self.folder / "trial.log"
        log.unlink(missing_ok=True)
        child = start(self.commands[name], log)

        def kill_child() -> None:
            with suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)

        timer = threading.Timer(DEADLINE, kill_child)
        timer.start()
        code = finish(child)
        timer.cancel()
        return code, self._result(name) if code == 0 else None, log.read_text(errors="replace")

    def _result(self, name: str) -> Any:
        if name == "evaluate":
            return json.loads((self.work / "lm" / "evaluation.json").read_text())["figures"]
        if name == "predict":
            return {path.name: path.read_bytes() for path in sorted((self.work / "out").glob("*.npy"))}
        found = outcome(self.work / ("half" if name == "resume" else "new"))
        return {key: found[key] for key in ("figures", "best") if key in found}


def verdict(code: int, same: bool, text: str) -> str:
    """The outcome of a trial: "clean", "silent" or "crash"."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if "Traceback" in text or code not in (0, 2) or (code == 2 and len(errors) != 1):
        return "crash"
    return "clean" if code == 2 or same else "silent"


def main() -> None:
    """Runs the trials."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name))
        files = world.files()
        for number in range(1, arguments.trials + 1):
            world.restore()
            file, damage = chance.choice(chance.choice(files)), chance.choice(DAMAGES)
            command = chance.choice(list(world.commands))
            content = file.read_bytes()
            file.write_bytes(damage(content, chance) if content else b"\0")
            code, result, text = world.use(command)
            found = verdict(code, result == world.expected[command], text)
            counts[found] += 1
            if found != "clean":
                last = (text.strip().splitlines() or [""])[-1]
                where = file.relative_to(world.work)
                print(f"{number:3d} {found}: {where} {damage.__name__}, {command}: exit {code}: {last}", flush=True)
            if number % 25 == 0 or number == arguments.trials:
                print(f"{number} trials: " + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS), flush=True)
    sys.exit(counts["clean"] != arguments.trials)


if __name__ == "__main__":
    main()
