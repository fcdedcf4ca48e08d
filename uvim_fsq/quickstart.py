"""The main job in small: make scenes, train an FSQ oracle and its LM, evaluate, draw one page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from rich.console import Console
from rich.table import Table

from uvim_fsq.config import LMRun, OracleRun, Run
from uvim_fsq.config_io import load_run
from uvim_fsq.data.synth_writers import write_dataset
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import (
    Evaluator,
    constant_prediction,
    context_predictions,
    evaluate_loaded,
    lm_predictions,
    oracle_predictions,
)
from uvim_fsq.models import Loaded, load_checkpoint, resolve
from uvim_fsq.report import curve_figure, html_table, panel_rows, png_tag, tile, usage_figure, write_report
from uvim_fsq.training.run import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "nyu_depth"
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """What differs between the small job and the one for a GPU."""

    configs: str
    num_train: int
    num_val: int
    size: int
    difficulty: str


SMALL = Scale("quickstart", num_train=16_000, num_val=500, size=32, difficulty="plain")
GPU = Scale("quickstart_gpu", num_train=60_000, num_val=1_000, size=128, difficulty="plain")


@dataclass
class Timer:
    """Wall-clock seconds per stage of the job."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return result


def quickstart(out: Path, gpu_scale: bool = False) -> dict[str, Any]:
    """Runs the whole job into `out` and returns what it writes to `out`/summary.json.

    Finished stages of an earlier call are kept: a second call costs nothing, an interrupted one goes on where it was.

    Raises UserError for `gpu_scale` where there is no GPU.
    """
    if gpu_scale and not torch.cuda.is_available():
        raise UserError("--gpu-scale needs a GPU and none is visible; run the small job without it")
    console = Console()
    scale = GPU if gpu_scale else SMALL
    summary_file = out / "summary.json"
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text())
        console.print(f"{out} holds a finished run; delete it to run again")
        _print_table(console, summary, out)
        return summary
    timer = Timer(_read_seconds(out))
    data = out / "data"
    if not data.exists():
        console.print(f"[bold]1/4[/] {scale.num_train} training and {scale.num_val} test scenes -> {data}")
        timer("data", lambda: _make_data(scale, data))
        _write_seconds(out, timer)
    runs: dict[str, Path] = {}
    for number, name in ((2, "oracle"), (3, "lm")):
        runs[name] = out / name
        if not (runs[name] / "evaluation.json").is_file():
            run = _run_config(scale, name, out)
            console.print(f"[bold]{number}/4[/] train the {'oracle' if name == 'oracle' else 'language model'}")
            timer(name, lambda run=run: train(run))
            _write_seconds(out, timer)
    console.print("[bold]4/4[/] evaluate and draw")
    summary = timer("evaluate", lambda: _evaluate(out, runs, timer))
    summary["seconds"] = {**timer.seconds, "total": round(sum(timer.seconds.values()), 1)}
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    _print_table(console, summary, out)
    return summary


def _make_data(scale: Scale, out: Path) -> None:
    write_dataset(
        "nyu", out, scale.num_train, scale.size, num_val=scale.num_val, layout="mat", difficulty=scale.difficulty
    )


def _run_config(scale: Scale, name: str, out: Path) -> Run:
    file = CONFIGS / f"{scale.configs}_{name}.yaml"
    if not file.is_file():
        raise UserError(f"{file} is missing; run the quickstart from a clone of the project")
    overrides = [f"train.out={out / name}", "train.resume=auto", f"data.root={(out / 'data').resolve()}"]
    if name == "lm":
        overrides.append(f"oracle={out / 'oracle'}")
    run = resolve(load_run(file, overrides))
    assert isinstance(run, OracleRun | LMRun)
    return run


def _seconds_file(out: Path) -> Path:
    return out / "seconds.json"


def _read_seconds(out: Path) -> dict[str, float]:
    file = _seconds_file(out)
    return json.loads(file.read_text()) if file.is_file() else {}


def _write_seconds(out: Path, timer: Timer) -> None:
    _seconds_file(out).write_text(json.dumps(timer.seconds) + "\n")


def _evaluate(out: Path, runs: dict[str, Path], timer: Timer) -> dict[str, Any]:
    device = torch.device(PartialState().device or "cpu")
    loaded = load_checkpoint(runs["lm"], device=device)
    task, run = loaded.task, loaded.run
    mean_map = task.baseline(task.source(run.data.root, run.data.train_split), run.data.image_size)
    baseline = Evaluator(task, run.data, run.eval).run(constant_prediction(mean_map), device)
    result = evaluate_loaded(loaded, device=device)
    result["figures"] = {"baseline": baseline, **result["figures"]}
    (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    _report(out, runs, loaded, result, device)
    figures = result["figures"]
    return {
        "baseline_rmse": baseline["rmse"],
        "oracle_rmse": figures["oracle"]["rmse"],
        "context_only_rmse": figures["context_only"]["rmse"],
        "lm_rmse": figures["lm"]["rmse"],
        "codebook_usage": figures["oracle"]["codebook_usage"],
        "figures": figures,
        "protocol": result["protocol"],
        "task_options": result["task_options"],
        "data": result["data"],
        "versions": result["versions"],
    }


NAMES = {
    "baseline": "baseline: mean depth map of the training set",
    "context_only": "oracle, all codes zeroed (context alone)",
    "lm": "LM: image -> tokens -> depth",
    "oracle": "oracle: depth -> tokens -> depth",
}


def _table_rows(figures: dict[str, dict[str, float]]) -> list[list[str]]:
    base = figures["baseline"]["rmse"]
    rows = [["", "RMSE (m)", "of the baseline", "abs_rel", "delta1", "codebook usage"]]
    for key, title in NAMES.items():
        f = figures[key]
        usage = f"{f['codebook_usage']:.1%}" if "codebook_usage" in f else ""
        rows.append(
            [title, f"{f['rmse']:.3f}", f"{f['rmse'] / base:.2f}", f"{f['abs_rel']:.3f}", f"{f['delta1']:.3f}", usage]
        )
    return rows


def _print_table(console: Console, summary: dict[str, Any], out: Path) -> None:
    rows = _table_rows(summary["figures"])
    table = Table(title=f"{summary['data'].get('count', '')} scenes never trained on ({summary['protocol']})")
    for i, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print("seconds: " + ", ".join(f"{name} {value}" for name, value in summary["seconds"].items()))
    console.print(f"report: {out / 'report.html'}   summary: {out / 'summary.json'}", soft_wrap=True)


def _report(out: Path, runs: dict[str, Path], loaded: Loaded, result: dict[str, Any], device: torch.device) -> None:
    task, oracle, lm = loaded.task, loaded.oracle, loaded.lm
    assert lm is not None
    ways = {
        "oracle": oracle_predictions(oracle, task),
        "context alone": context_predictions(oracle, task),
        "LM": lm_predictions(lm, oracle, task, loaded.run.eval),
    }
    rows = panel_rows(task, loaded.run.data, ways, device, count=8)
    wanted = ("image", "ground truth", "oracle", "context alone", "LM", "LM error")
    rows = [{title: row[title] for title in wanted if title in row} for row in rows]
    write_report(
        out / "report.html",
        "uvim_fsq quickstart: depth by discrete tokens",
        [
            ("Results", html_table(_table_rows(result["figures"])) + _facts(result)),
            ("Panels", png_tag(tile(rows), "image, ground truth, oracle, context alone, LM, error")),
            ("Training", png_tag(curve_figure(runs), "training loss of both stages")),
            (
                "Codebook",
                png_tag(usage_figure(result["code_counts"]["oracle"], result["level_histogram"]["oracle"]), "usage"),
            ),
        ],
    )


def _facts(result: dict[str, Any]) -> str:
    facts = {
        "protocol": result["protocol"],
        "data": ", ".join(f"{key} {value}" for key, value in result["data"].items()),
        "task": ", ".join(f"{key}={value}" for key, value in result["task_options"].items()),
        "checkpoint": result["checkpoint_sha256"][:16],
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
    }
    return "<p>" + "<br>".join(f"{key}: <code>{value}</code>" for key, value in facts.items()) + "</p>"
