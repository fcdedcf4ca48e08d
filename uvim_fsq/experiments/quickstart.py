"""The whole pipeline at a small scale: render scenes, train an FSQ oracle and its LM, evaluate, write a report.

On request it also trains the direct baseline, to compare with.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import load_checkpoint, load_direct
from uvim_fsq.config.schema import Run
from uvim_fsq.config.shipped import find_config
from uvim_fsq.console import Bar
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.examination import Examined
from uvim_fsq.evaluation.results import finished, result_file
from uvim_fsq.evaluation.run import evaluate_loaded
from uvim_fsq.files import read_json, write_json
from uvim_fsq.reports.evaluation_page import result_table, write_evaluation_page
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.configuration import load_run, without_token_keys
from uvim_fsq.tasks.registry import task_class
from uvim_fsq.training.run import train

T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """What differs between the quickstart and its larger version for a GPU, besides their configurations."""

    configs: str
    num_train: int
    num_val: int
    difficulty: str


SMALL = Scale("quickstart", num_train=16_000, num_val=500, difficulty="plain")
GPU = Scale("quickstart_gpu", num_train=60_000, num_val=1_000, difficulty="plain")

#: Stage -> what it trains.
TRAINED = {"oracle": "the oracle", "lm": "the language model", "direct": "the direct baseline"}


@dataclass
class Timer:
    """Measures the wall-clock seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return result


def quickstart(
    out: Path,
    gpu_scale: bool = False,
    task: str = "nyu_depth",
    *,
    scenes: int | None = None,
    overrides: Sequence[str] = (),
    compare: bool = False,
) -> dict[str, Any]:
    """Runs the pipeline for `task` in the folder `out` and returns the content of `out`/summary.json.

    Stages that an earlier call finished are not repeated, so an interrupted quickstart can be continued.

    Args:
        gpu_scale: use more and larger scenes and larger models.
        scenes: number of training scenes; None means the default. There are at most as many test scenes.
        overrides: `key=value` settings of both stages, and of the direct baseline if it has the key.
        compare: also train the direct baseline, and add it to the results.

    Raises:
        UserError: `gpu_scale` without a GPU, or a task without synthetic data.
    """
    if task_class(task).synthetic is None:
        raise UserError(f"task {task} has no synthetic data, which the quickstart needs")
    scale, console = _choose_scale(gpu_scale, scenes), Console()
    summary_file = out / "summary.json"
    summary = _read_summary(summary_file)
    if summary is not None and (not compare or "direct" in summary["figures"]):
        console.print(f"{out} holds a finished run; delete it to run again")
        _print_table(console, summary, out)
        return summary
    timer = Timer(_read_seconds(out))
    names = ("oracle", "lm", *(("direct",) if compare else ()))
    steps = len(names) + 2
    data = out / "data"
    if not data.exists():
        counts = f"{scale.num_train} training and {scale.num_val} test scenes"
        console.print(f"[bold]1/{steps}[/] {counts} -> {data}", soft_wrap=True)
        size = _run_config(scale, task, "oracle", out, overrides).data.image_size
        timer("data", lambda: _make_data(scale, data, task, size))
        _write_seconds(out, timer)
    runs: dict[str, Path] = {}
    for number, name in enumerate(names, 2):
        runs[name] = out / name
        if not finished(runs[name]):
            run = _run_config(scale, task, name, out, overrides)
            console.print(f"[bold]{number}/{steps}[/] train {TRAINED[name]}")
            timer(name, lambda run=run: train(run))
            _write_seconds(out, timer)
    console.print(f"[bold]{steps}/{steps}[/] evaluate and write the report")
    summary = timer("evaluate", lambda: _evaluate(out, runs))
    summary["seconds"] = {**timer.seconds, "total": round(sum(timer.seconds.values()), 1)}
    write_json(summary_file, summary)
    _print_table(console, summary, out)
    return summary


def _choose_scale(gpu_scale: bool, scenes: int | None) -> Scale:
    if gpu_scale and not torch.cuda.is_available():
        raise UserError("--gpu-scale needs a GPU and none is visible; run without it at the small scale")
    scale = GPU if gpu_scale else SMALL
    if scenes is None:
        return scale
    if scenes < 1:
        raise UserError(f"--scenes {scenes}: at least one scene is needed")
    return replace(scale, num_train=scenes, num_val=min(scale.num_val, scenes))


def _make_data(scale: Scale, out: Path, task: str, size: int) -> None:
    cls = task_class(task)
    assert cls.synthetic is not None
    with Bar(f"scenes -> {out}") as bar:
        write_dataset(
            cls.synthetic,
            out,
            scale.num_train,
            size,
            num_val=scale.num_val,
            layout="mat",
            difficulty=scale.difficulty,
            world=cls.synthetic_world,
            progress=bar.update,
        )


def _run_config(scale: Scale, task: str, name: str, out: Path, given: Sequence[str]) -> Run:
    file = find_config(f"{task}/{scale.configs}_{name}")
    overrides = [f"train.out={out / name}", "train.resume=auto", f"data.root={(out / 'data').resolve()}"]
    if name == "lm":
        overrides.append(f"oracle={out / 'oracle'}")
    return load_run(file, [*(without_token_keys(given) if name == "direct" else given), *overrides])


def _seconds_file(out: Path) -> Path:
    return out / "seconds.json"


def _read_seconds(out: Path) -> dict[str, float]:
    """The times of finished stages; if the file is damaged, a warning and no times."""
    try:
        seconds = read_json(_seconds_file(out), "the times of finished stages are lost")
    except FileNotFoundError:
        return {}
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
    return {name: value for name, value in seconds.items() if isinstance(value, (int, float))}


def _write_seconds(out: Path, timer: Timer) -> None:
    write_json(_seconds_file(out), timer.seconds, indent=None)


def _read_summary(file: Path) -> dict[str, Any] | None:
    """The summary of a finished run. None if it is missing or damaged, so that the last stage runs again."""
    try:
        summary = read_json(file, "evaluating again")
    except FileNotFoundError:
        return None
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    return summary if {"table", "figures", "data", "protocol", "seconds"} <= set(summary) else None


def _evaluate(out: Path, runs: dict[str, Path]) -> dict[str, Any]:
    device = processes.device()
    loaded = load_checkpoint(runs["lm"], device=device)
    compared = load_direct(runs["direct"], device=device) if "direct" in runs else None
    examined: dict[str, Examined] = {}
    result = evaluate_loaded(loaded, device=device, baseline=True, compared=compared, examined=examined)
    write_json(result_file(out), result)
    title = f"uvim_fsq quickstart: {loaded.task.name} by discrete tokens"
    write_evaluation_page(out / "report.html", title, loaded, result, runs, device, compared, examined)
    figures, metric = result["figures"], loaded.task.main_metric
    return {
        **{f"{name}_{metric}": figures[name][metric] for name in figures},
        "codebook_usage": figures["oracle"]["codebook_usage"],
        "table": result_table(loaded.task, result),
        **{key: result[key] for key in ("figures", "protocol", "baseline", "task_options", "data", "versions")},
    }


def _print_table(console: Console, summary: dict[str, Any], out: Path) -> None:
    rows = summary["table"]
    table = Table(title=f"{summary['data'].get('count', '')} held-out scenes ({summary['protocol']})")
    for i, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print("seconds: " + ", ".join(f"{name} {value}" for name, value in summary["seconds"].items()))
    console.print(f"report: {out / 'report.html'}   summary: {out / 'summary.json'}", soft_wrap=True)
