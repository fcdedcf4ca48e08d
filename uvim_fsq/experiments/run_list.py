"""A list of the runs below a folder: what they train, how far they are and what they have reached.

Reads small files only, imports neither plugins nor weights, and follows no links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from uvim_fsq.checkpoints.run_directory import CONFIG, STATE, best, checkpoints, read_evaluation
from uvim_fsq.config.yaml_files import skim_tree
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import read_result, result_file
from uvim_fsq.files import read_json_lines
from uvim_fsq.training.lock import LOCK, is_held

#: The stages of a run -> the figures of its result that it is about.
ROWS = {"oracle": "oracle", "lm": "lm", "direct": "direct"}
STATES = ("running", "finished", "interrupted", "imported", "damaged")
#: The end of a log that is read, in bytes; logs of long trainings have many megabytes.
TAIL = 1 << 16


@dataclass(frozen=True)
class ListedRun:
    """One run. What could not be read, or does not exist yet, is None or empty.

    Attributes:
        run: its path, relative to the folder that was searched.
        steps: optimizer steps done.
        planned: the length of its training, e.g. "4000" or "20 epochs".
        state: one of `STATES`. "interrupted" runs were started, have no result, and nobody trains them now.
        metric, figure: the main metric, of the result or else of training's own last evaluation.
        protocol: what the figure was obtained with; training's own evaluations are named as such.
        date: when it was last written, ISO 8601 in UTC.
        problem: what is damaged.
    """

    run: str
    task: str = ""
    stage: str = ""
    steps: int | None = None
    planned: str = ""
    state: str = "damaged"
    metric: str = ""
    figure: float | None = None
    protocol: str = ""
    date: str = ""
    problem: str = ""


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in a folder or below it, sorted. A run's own folders are not searched.

    Raises UserError if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for place, folders, files in os.walk(folder):
        if _is_run(Path(place), folders, files):
            folders.clear()
            yield Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _is_run(place: Path, folders: list[str], files: list[str]) -> bool:
    if CONFIG in files and ("metrics.jsonl" in files or LOCK in files):
        return True
    return "checkpoints" in folders and (CONFIG in files or any(place.glob("checkpoints/step_*")))


def list_runs(folder: Path) -> list[ListedRun]:
    """All runs below a folder, those whose files are damaged included. Raises UserError if there is no such folder."""
    return [_describe(folder, path) for path in find_runs(folder)]


def _describe(folder: Path, path: Path) -> ListedRun:
    found = ListedRun(run=path.relative_to(folder).as_posix())
    try:
        found = replace(found, date=_date(path))
        found = _with_config(found, path)
        found = replace(found, steps=_steps(path))
        found = _with_figure(found, path)
        return replace(found, state=_state(found, path))
    except Exception as error:  # whatever damage does; the other runs are listed all the same
        problem = " ".join(str(error).split()) or type(error).__name__
        return replace(found, state="running" if is_held(path) else "damaged", problem=problem)


def _with_config(found: ListedRun, path: Path) -> ListedRun:
    saved = checkpoints(path)
    file = path / CONFIG if (path / CONFIG).is_file() or not saved else saved[-1] / CONFIG
    if not file.is_file():
        raise UserError(f"{file} is missing")
    tree = skim_tree(file)
    train, task = (tree.get(key) or {} for key in ("train", "task"))
    stage = tree.get("stage")
    if stage not in ROWS or not isinstance(train, dict) or not isinstance(task, dict):
        raise UserError(f"{file} is not the configuration of a run")
    planned = str(train["steps"]) if train.get("steps") else ""
    if not planned and train.get("epochs"):
        planned = f"{float(train['epochs']):g} epochs"
    return replace(found, task=str(task.get("name", "")), stage=stage, planned=planned)


def _steps(path: Path) -> int | None:
    lines = read_json_lines(path / "metrics.jsonl", TAIL)
    logged = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    saved = [int(place.name.removeprefix("step_")) for place in checkpoints(path)]
    return max([*logged[-1:], *saved[-1:]], default=None)


def _with_figure(found: ListedRun, path: Path) -> ListedRun:
    try:
        result = read_result(path)
    except FileNotFoundError:
        return _with_own_figure(found, path)
    metric = str(result["main_metric"])
    values = result["figures"].get(ROWS[found.stage], {})
    limit = f", first {result['limit']} images" if result["limit"] else ""
    data = result["data"]
    split = f" ({data.get('split', '?')}{limit})"
    return replace(found, metric=metric, figure=_number(values.get(metric)), protocol=f"{result['protocol']}{split}")


def _with_own_figure(found: ListedRun, path: Path) -> ListedRun:
    """The figure of training's own best, else last, evaluation."""
    chosen = best(path)
    places = [chosen[0]] if chosen is not None else checkpoints(path)[::-1]
    evaluation = next(filter(None, map(read_evaluation, places)), None)
    if evaluation is None:
        return found
    selection, figures = evaluation.selection, evaluation.figures
    metric = selection.metric or next(iter(figures), "")
    protocol = f"{selection.protocol} ({selection.split}, in training)"
    return replace(found, metric=metric, figure=_number(figures.get(metric)), protocol=protocol)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _state(found: ListedRun, path: Path) -> str:
    if is_held(path):
        return "running"
    if result_file(path).is_file():
        return "finished"
    saved = checkpoints(path)
    if saved and not (saved[-1] / STATE).is_file():
        return "imported"
    return "interrupted"


def _date(path: Path) -> str:
    places = [path / name for name in ("evaluation.json", "metrics.jsonl", CONFIG, "checkpoints")]
    times = [place.lstat().st_mtime for place in places if place.exists()]
    newest = datetime.fromtimestamp(max(times, default=0.0), timezone.utc)
    return newest.strftime("%Y-%m-%dT%H:%M:%SZ")
