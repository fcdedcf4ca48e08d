"""Evaluates a run's checkpoint: figures of oracle, context alone and language model, with their provenance."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from uvim_fsq import files, processes
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash
from uvim_fsq.config.parse import to_dict
from uvim_fsq.errors import EVALUATION_REMEDY, enough_memory
from uvim_fsq.evaluation.evaluator import Evaluator, make_baseline
from uvim_fsq.inference.predictions import baseline_predictions, predict_functions
from uvim_fsq.oracle.code_usage import CodeStatistics
from uvim_fsq.version import __version__

#: What of `eval.` may change the figures; named by each result.
DECODING_KEYS = ("temperature", "top_k", "top_p", "seed", "precision", "int8_cross_kv")


def evaluate_loaded(
    loaded: LoadedRun,
    *,
    device: torch.device,
    limit: int | None = None,
    csv_file: Path | None = None,
    baseline: bool = False,
    official: Path | None = None,
) -> dict[str, Any]:
    """Oracle, context alone and (for an LM's checkpoint) LM, with protocol, split, counts and checkpoint.

    Args:
        limit: the first images only; None: as the configuration says.
        csv_file: where each image's own figures go.
        baseline: also the task's trivial baseline, made from the training split.
        official: folder for the benchmark's own result files, one sub-folder a way; scored where possible.
    """
    checkpoint_sha256 = file_hash(loaded.checkpoint / "model.safetensors")
    processes.same(checkpoint_sha256, loaded.checkpoint)
    run, task, quantizer = loaded.run, loaded.task, loaded.oracle.to(device).quantizer
    if loaded.lm is not None:
        loaded.lm.to(device)
    limit = limit if limit is not None else run.eval.limit
    ways = predict_functions(loaded)
    trivial = make_baseline(task, run) if baseline else None
    if trivial is not None:
        ways = {"baseline": baseline_predictions(trivial), **ways}
    figures: dict[str, dict[str, float]] = {}
    levels: dict[str, list[list[int]]] = {}
    counts: dict[str, list[int]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    evaluator = Evaluator(task, run.data, run.eval, limit=limit)
    for name, predict in ways.items():
        evaluator.statistics = CodeStatistics(quantizer) if name in ("oracle", "lm") else None
        writer = task.official(official / name, evaluator.source) if official is not None else None
        figures[name] = evaluator.run(predict, device, writer, title=f"evaluating {name}")
        rows[name] = [row for part in processes.gather(evaluator.rows) for row in part]
        if evaluator.statistics is not None:
            levels[name] = evaluator.statistics.level_histogram()
            counts[name] = [int(count) for count in evaluator.statistics.counts]
    if csv_file is not None and processes.is_main():
        write_csv(csv_file, rows)
    return {
        **provenance(loaded, evaluator, device),
        "checkpoint_sha256": checkpoint_sha256,
        "baseline": trivial.name if trivial is not None else None,
        "limit": limit,
        "images": len(next(iter(rows.values()))),
        "figures": figures,
        "code_counts": counts,
        "level_histogram": levels,
    }


def provenance(loaded: LoadedRun, evaluator: Evaluator, device: torch.device) -> dict[str, Any]:
    """What figures were obtained with: without it they mean nothing."""
    run, task = loaded.run, loaded.task
    return {
        "task": task.name,
        "protocol": evaluator.protocol,
        "main_metric": task.main_metric,
        "data": {**evaluator.source.info, "image_size": run.data.image_size},
        "decoding": {key: getattr(run.eval, key) for key in DECODING_KEYS},
        "task_options": to_dict(task.config),
        "overrides": loaded.overrides,
        "checkpoint": str(loaded.checkpoint),
        "chosen": loaded.chosen,
        "versions": {
            "uvim_fsq": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(device),
        },
    }


def write_csv(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """One line per way and image: way, id and that image's figures."""
    flat = [{"way": way, **row} for way, items in rows.items() for row in items]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    files.write_csv(path, [keys, *([row.get(key, "") for key in keys] for row in flat)])


def evaluate(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    csv: Path | None = None,
    baseline: bool = False,
    official: Path | None = None,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint (see `load_checkpoint`; or a given one) by its task's protocol.

    Refuses an unreadable image.

    `csv`, `baseline` and `official` are those of `evaluate_loaded`.
    """
    device = processes.device()
    limited = [] if limit is None else [f"eval.limit={limit}"]
    loaded = load_checkpoint(run_dir, [*overrides, *limited], device)
    loaded.run = replace(loaded.run, data=replace(loaded.run.data, max_bad_samples=0))
    with enough_memory(EVALUATION_REMEDY):
        result = evaluate_loaded(loaded, csv_file=csv, device=device, baseline=baseline, official=official)
    return result
