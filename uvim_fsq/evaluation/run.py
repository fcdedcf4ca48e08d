"""Evaluates a checkpoint: metrics of its predictions, e.g. of oracle, context alone and LM, with their provenance."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from uvim_fsq import files, processes
from uvim_fsq.checkpoints.hub import provenance_name
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_any
from uvim_fsq.checkpoints.run_directory import file_hash
from uvim_fsq.checkpoints.tuned import TUNED_KEYS
from uvim_fsq.config.parse import to_dict
from uvim_fsq.errors import EVALUATION_REMEDY, enough_memory
from uvim_fsq.evaluation.comparison import load_compared, refuse_different, refuse_other_images
from uvim_fsq.evaluation.decodings import measure_decodings, refuse_without_lm
from uvim_fsq.evaluation.evaluator import Evaluator, make_baseline
from uvim_fsq.evaluation.examination import Examined, Examiner
from uvim_fsq.evaluation.intervals import ImageStates, Stacked, intervals, write_states
from uvim_fsq.inference.predictions import baseline_predictions, predict_functions
from uvim_fsq.oracle.code_usage import CodeStatistics
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.tasks.base import Matrix, Task
from uvim_fsq.version import __version__

#: The keys of `eval` that may change the results; recorded with each result.
DECODING_KEYS = (*TUNED_KEYS, "seed", "precision", "int8_cross_kv")

#: Name of a predict function -> the metrics of each image.
Rows = dict[str, list[dict[str, Any]]]


def evaluate_loaded(
    loaded: LoadedRun | LoadedDirect,
    *,
    device: torch.device,
    limit: int | None = None,
    csv_file: Path | None = None,
    baseline: bool = False,
    official: Path | None = None,
    compared: LoadedDirect | None = None,
    states_file: Path | None = None,
    examined: dict[str, Examined] | None = None,
    decodings: bool = False,
) -> dict[str, Any]:
    """Evaluates the oracle, the context alone and, for an LM's checkpoint, the LM; of a direct run, its model.

    Args:
        loaded: the checkpoint.
        device: where to run the models.
        limit: evaluate only the first images; None means `eval.limit`.
        csv_file: if given, write the metrics of each image to this file.
        baseline: also evaluate the task's trivial baseline, built from the training split.
        official: folder for result files in the benchmark's own format, one subfolder per predict function. They are
            also scored if the benchmark's program is available.
        compared: a direct run to evaluate too.
        states_file: if given, write what each image added to the metrics to this .npz file, for `intervals.resampled`.
        examined: if given, a dictionary that is filled with what a report shows besides, by name of the predict
            function. The result does not depend on it.
        decodings: also measure the LM with other decoding settings, see `measure_decodings`.

    Returns `provenance` and the results: `figures` (name of the predict function -> metric -> value), `intervals` (of
    differences in the main metric, see `intervals`), `images`, `limit`, `baseline`, `checkpoint_sha256`, and
    `code_counts`, `level_histogram` and, if the metric has any, `matrices` by name. With a compared run also
    `compared`: the provenance of its figures. With `decodings`, these too.

    Raises UserError if the compared run would be evaluated on other images or by another protocol, and for `decodings`
    of a run without an LM.
    """
    if decodings:
        refuse_without_lm(loaded)
    limit = limit if limit is not None else loaded.run.eval.limit
    evaluator = Evaluator(loaded.task, loaded.run.data, loaded.run.eval, limit=limit, record=True)
    other = None
    if compared is not None:
        other = Evaluator(compared.task, compared.run.data, compared.run.eval, limit=limit, record=True)
        refuse_different(evaluator, other, loaded.checkpoint, compared.checkpoint)
    result, rows, states = _evaluate(loaded, evaluator, device, baseline, official, examined)
    if compared is not None and other is not None:
        second, other_rows, other_states = _evaluate(compared, other, device, False, official, examined)
        refuse_other_images(next(iter(rows.values())), other_rows["direct"], compared.checkpoint)
        _add_compared(result, second, provenance(compared, other, device))
        rows |= other_rows
        states |= other_states
    result["intervals"] = intervals(loaded.task.metric(evaluator.source), loaded.task.main_metric, states)
    if decodings:
        result["decodings"] = measure_decodings(refuse_without_lm(loaded), evaluator, device, result["figures"]["lm"])
    if processes.is_main():
        if csv_file is not None:
            write_rows(csv_file, rows)
        if states_file is not None:
            write_states(states_file, states)
    return result


def _add_compared(result: dict[str, Any], second: Mapping[str, Any], origin: Iterable[str]) -> None:
    """Adds the figures of a compared run's result to `result`, and where they come from: the keys `origin`."""
    about = {key: second[key] for key in ("checkpoint_sha256", *origin)}
    result |= {"figures": {**result["figures"], **second["figures"]}, "compared": {"direct": about}}
    if "matrices" in result:
        result["matrices"] |= second["matrices"]


def _evaluate(
    loaded: LoadedRun | LoadedDirect,
    evaluator: Evaluator,
    device: torch.device,
    baseline: bool,
    official: Path | None,
    examined: dict[str, Examined] | None,
) -> tuple[dict[str, Any], Rows, dict[str, Stacked]]:
    """The result of one checkpoint, as `evaluate_loaded` returns it, and the metrics and states of each image."""
    checkpoint_sha256 = file_hash(loaded.checkpoint / "model.safetensors")
    processes.same(checkpoint_sha256, loaded.checkpoint)
    loaded.to(device)
    task, quantizer = loaded.task, loaded.oracle.quantizer if isinstance(loaded, LoadedRun) else None
    predict_fns = predict_functions(loaded, confidence=examined is not None)
    trivial = make_baseline(task, loaded.run) if baseline else None
    if trivial is not None:
        predict_fns = {"baseline": baseline_predictions(trivial), **predict_fns}
    figures: dict[str, dict[str, float]] = {}
    codes: dict[str, CodeStatistics] = {}
    rows: Rows = {}
    states: dict[str, Stacked] = {}
    matrices: dict[str, dict[str, Any]] = {}
    for name, predict in predict_fns.items():
        evaluator.statistics = CodeStatistics(quantizer) if quantizer is not None and name in ("oracle", "lm") else None
        writer = task.official(official / name, evaluator.source) if official is not None else None
        examiner = _examiner(task, evaluator, quantizer) if examined is not None else None
        figures[name] = evaluator.run(predict, device, writer, title=f"evaluating {name}", examiner=examiner)
        rows[name] = [row for part in processes.gather(evaluator.rows) for row in part]
        matrices[name] = {key: _plain(matrix) for key, matrix in evaluator.matrices.items()}
        recorded = processes.gather(evaluator.states)
        if any(part.ids for part in recorded):
            states[name] = ImageStates.joined(recorded).stacked()
        if examined is not None and examiner is not None:
            examined[name] = examiner.finish(
                lambda: task.metric(evaluator.source), task.main_metric, rows[name], states.get(name)
            )
        if evaluator.statistics is not None:
            codes[name] = evaluator.statistics
    result = {
        **provenance(loaded, evaluator, device),
        "checkpoint_sha256": checkpoint_sha256,
        "baseline": trivial.name if trivial is not None else None,
        "limit": evaluator.limit,
        "images": len(next(iter(rows.values()))),
        "figures": figures,
        "code_counts": {name: [int(count) for count in found.counts] for name, found in codes.items()},
        "level_histogram": {name: found.level_histogram() for name, found in codes.items()},
        **({"matrices": matrices} if any(matrices.values()) else {}),
    }
    return result, rows, states


def _examiner(task: Task, evaluator: Evaluator, quantizer: Quantizer | None) -> Examiner:
    return Examiner(task, evaluator.source, quantizer.codebook_size if quantizer is not None else 0)


def _plain(matrix: Matrix) -> dict[str, Any]:
    """A matrix as JSON has it."""
    return {"rows": list(matrix.rows), "columns": list(matrix.columns), "values": matrix.values.tolist()}


def provenance(loaded: LoadedRun | LoadedDirect, evaluator: Evaluator, device: torch.device) -> dict[str, Any]:
    """How results were obtained: task, protocol, data, decoding settings, checkpoint and versions."""
    run, task = loaded.run, loaded.task
    return {
        "task": task.name,
        "protocol": evaluator.protocol,
        "metric_details": evaluator.metric_details,
        "main_metric": task.main_metric,
        "data": {**evaluator.source.info, "image_size": run.data.image_size},
        "decoding": {key: getattr(run.eval, key) for key in DECODING_KEYS if hasattr(run.eval, key)},
        "decoding_from": loaded.decoding_from,
        "task_options": to_dict(task.config),
        "overrides": loaded.overrides,
        **({"ancestors": [asdict(ancestor) for ancestor in run.ancestors]} if run.ancestors else {}),
        "checkpoint": provenance_name(loaded.checkpoint),
        "chosen": loaded.chosen,
        "versions": {
            "uvim_fsq": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(device),
        },
    }


def write_rows(path: Path, rows: Rows) -> None:
    """Writes one line per predict function and image: the function's name, the image's id and its metrics."""
    flat = [{"way": name, **row} for name, items in rows.items() for row in items]
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
    compare: str | Path | None = None,
    states: Path | None = None,
    tuned: bool = True,
    examined: dict[str, Examined] | None = None,
    decodings: bool = False,
) -> dict[str, Any]:
    """Evaluates a run or checkpoint directory according to its task's protocol.

    Args:
        run_dir: a run, whose checkpoint is chosen as in `load_any`, or a checkpoint directory.
        overrides: `key=value` strings. They apply to the run to compare with too, except for keys that it lacks.
        limit: evaluate only the first images; sets `eval.limit`.
        csv: if given, write the metrics of each image to this file.
        baseline: also evaluate the task's trivial baseline.
        official: folder for result files in the benchmark's own format.
        compare: a direct run or checkpoint directory, whose figures are added under "direct".
        states: if given, write what each image added to the metrics to this .npz file.
        tuned: apply the settings that `uvim-fsq tune` chose for the checkpoint, unless `eval.tuned` is false.
        examined: see `evaluate_loaded`.
        decodings: see `evaluate_loaded`.

    Returns the results of `evaluate_loaded`. Raises UserError for a run that cannot be loaded, for unreadable images,
    and for two runs whose figures cannot be compared.
    """
    device = processes.device()
    limited = [] if limit is None else [f"eval.limit={limit}"]
    loaded = load_any(run_dir, [*overrides, *limited], device, tuned=tuned)
    compared = load_compared(compare, loaded, overrides, device) if compare is not None else None
    with enough_memory(EVALUATION_REMEDY):
        return evaluate_loaded(
            loaded,
            csv_file=csv,
            device=device,
            baseline=baseline,
            official=official,
            compared=compared,
            states_file=states,
            examined=examined,
            decodings=decodings,
        )
