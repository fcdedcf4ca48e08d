"""Analyzes what a run's codes encode and how much its predictions depend on them, for `uvim-fsq analyze`.

Uses only the `Task` interface. `code_pictures` draws the pictures. L is the code length, N the number of evaluated
images.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.checkpoints.hub import results_folder
from uvim_fsq.checkpoints.identity import describe_overrides
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash, find_oracle, resolve_checkpoint
from uvim_fsq.checkpoints.tuned import FROM_RUN
from uvim_fsq.config.schema import LMRun
from uvim_fsq.console import Bar
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.evaluation.run import evaluate_loaded
from uvim_fsq.experiments.code_pictures import Picture, draw, sees_image
from uvim_fsq.files import check_folder, write_json, write_whole
from uvim_fsq.inference.code_decoding import LMDecoder, Part, image_seeds
from uvim_fsq.inference.predictions import PredictFn, Predictions, context_predictions, eval_autocast, label_maps
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.tasks.base import Task


def partners(count: int, seed: int) -> np.ndarray:
    """(count,) int64: for each image, the image whose codes it gets. One random cycle, so no image keeps its own."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


@torch.inference_mode()
def collect(
    loaded: LoadedRun, limit: int | None, device: torch.device, compute: Callable[[Batch], torch.Tensor]
) -> np.ndarray:
    """What `compute` returns, (B, ...) for a batch, of all evaluation images.

    Returns (N, ...) in the source's order, on every process.
    """
    run, state = loaded.run, processes.state()
    source = loaded.task.source(run.data.root, run.data.eval_split)
    batches = eval_batches(
        source,
        loaded.task,
        run.data,
        batch_size=run.eval.batch_size,
        workers=run.eval.workers,
        limit=limit,
        rank=state.process_index,
        world=state.num_processes,
    )
    local: dict[int, np.ndarray] = {}
    count = min(limit or len(source), len(source))
    with Bar("codes", count) as bar:
        for batch, _ in batches:
            bar.update(min(len(local) * state.num_processes, count))
            batch = to_device(batch, device)
            with eval_autocast(run.eval, device):
                found = compute(batch)
            local |= zip(batch["index"].tolist(), found.cpu().numpy(), strict=True)
    found_by_index = {index: row for part in processes.gather(local) for index, row in part.items()}
    return np.stack([found_by_index[index] for index in sorted(found_by_index)])


def collect_tokens(loaded: LoadedRun, limit: int | None, device: torch.device) -> np.ndarray:
    """The oracle's tokens of all evaluation images, (N, L) int64."""
    return collect(loaded, limit, device, lambda batch: loaded.oracle.tokenize(batch["labels"], batch["image"]))


def shuffled_lm_predictions(
    loaded: LoadedRun, limit: int | None, device: torch.device, partner: np.ndarray
) -> PredictFn:
    """Predictions of an LM from each image's own context and features, and the codes predicted for another image."""
    assert loaded.lm is not None
    decoder = LMDecoder(loaded.lm, loaded.oracle, loaded.task, replace(loaded.run.eval, samples=1, context_weight=0.0))
    seed = loaded.run.eval.seed

    def parts(batch: Batch) -> list[Part]:
        return decoder.parts(batch["image"], image_seeds(seed, batch["index"]))[0]

    codes = collect(loaded, limit, device, lambda batch: parts(batch)[0].codes)

    def predict(batch: Batch) -> Predictions:
        given = torch.from_numpy(codes[partner[batch["index"].numpy()]]).to(device)
        shuffled = [part._replace(codes=given) for part in parts(batch)]
        return Predictions(decoder.decode(shuffled, batch["image"]), None)

    return predict


def shuffled_predictions(oracle: Oracle, task: Task, tokens: np.ndarray, partner: np.ndarray) -> PredictFn:
    """Predictions from each image's own context and the codes of another image, tokens[partner[i]]."""

    def predict(batch: Batch) -> Predictions:
        given = torch.from_numpy(tokens[partner[batch["index"].numpy()]]).to(batch["image"].device)
        codes = oracle.quantizer.indices_to_codes(given)
        return Predictions(label_maps(oracle, task, codes, batch["image"]), given)

    return predict


def describe_predictions(oracle: Oracle, images: int) -> dict[str, str]:
    """Prediction name -> description. All-zero codes give the same prediction as the context alone, under one name."""
    quantizer, dropout = oracle.quantizer, oracle.config.code_dropout
    if sees_image(oracle):
        name, zero = "context_only", "all codes zero, so the image alone: zero codes equal context alone"
    else:
        name, zero = "zero_codes", "all codes zero and no image for the decoder, so one constant prediction"
    zero += f"; trained with code dropout ({dropout})" if dropout != "none" else "; trained without code dropout"
    zero_codes = torch.zeros(quantizer.dim, device=quantizer.device)
    code = int(quantizer.codes_to_indices(zero_codes))
    if oracle.config.dropped_code == "zero" and not quantizer.codebook()[code].any():
        zero += f"; code {code} of the codebook is also zero"
    own = " with its own image" if sees_image(oracle) else ""
    return {
        "oracle": "each image's own codes, computed from its labels",
        "shuffled_codes": f"another image's codes{own}: one random cycle through all {images} images",
        name: zero,
        "lm": "codes predicted by the language model",
        "lm_shuffled_codes": "codes that the language model predicts for another image, with its own image",
    }


def _save_picture(picture: np.ndarray | Figure, file: Path) -> None:
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", dpi=100, bbox_inches="tight")
    else:
        Image.fromarray(picture).save(file, format="PNG")


def write_pages(out: Path, loaded: LoadedRun, result: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Writes analysis.json, report.html and the pictures as PNG files into the folder `out`."""
    write_json(out / "analysis.json", result)
    names = (loaded.task.main_metric, *loaded.task.secondary_metrics, "codebook_usage", "code_perplexity")
    rows = [["", *names, "description"]]
    for prediction, figures in result["figures"].items():
        values = [f"{figures[name]:.3f}" if name in figures else "" for name in names]
        rows.append([prediction.replace("_", " "), *values, result["descriptions"][prediction]])
    facts = {
        "protocol": result["protocol"],
        "data": ", ".join(f"{key} {value}" for key, value in result["data"].items()),
        "images": f"{result['images']}" + (f" (the first {result['limit']})" if result["limit"] else ""),
        "seed": str(result["seed"]),
        **({"settings": describe_overrides(result["overrides"])} if result["overrides"] else {}),
        **({"decoding": result["decoding_from"]} if result["decoding_from"] != FROM_RUN else {}),
        **{key: result[key][:16] for key in ("checkpoint_sha256", "oracle_sha256") if key in result},
    }
    lines = "<br>".join(f"{key}: <code>{html.escape(value)}</code>" for key, value in facts.items())
    sections = [("How much predictions depend on the codes", f"{html_table(rows)}<p>{lines}</p>")]
    for item in pictures:
        write_whole(out / f"{item.name}.png", functools.partial(_save_picture, item.picture))
        sections.append((item.heading, f"<p>{html.escape(item.caption)}</p>{png_tag(item.picture, item.name)}"))
    legend = loaded.task.legend()
    if legend is not None:
        sections.append(("Colors", png_tag(legend, "legend")))
    write_report(out / "report.html", f"{loaded.task.name}: what the codes encode", sections)


def analyze_run(
    run_dir: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Analyzes a run or checkpoint of either stage and writes the result to `out` (default: RUN/analysis).

    Returns:
        The content of analysis.json: the result of `evaluate_loaded`, the additional figures `shuffled_codes`, for an
        LM `lm_shuffled_codes` and, if the decoder does not see the image, `zero_codes`, and `descriptions` of all
        predictions.

    Raises:
        UserError: there are fewer than 2 evaluation images.
    """
    out = out or results_folder(run_dir) / "analysis"
    check_folder(out)
    device = processes.device()
    loaded = load_checkpoint(run_dir, overrides, device)
    loaded.run = replace(loaded.run, data=replace(loaded.run.data, max_bad_samples=0))
    run, task, oracle = loaded.run, loaded.task, loaded.oracle
    limit = limit if limit is not None else run.eval.limit
    available = len(task.source(run.data.root, run.data.eval_split))
    count = available if limit is None else min(limit, available)
    if count < 2:
        few = f"split {run.data.eval_split!r} has {available} image(s)" if available < 2 else f"limit={limit}"
        raise UserError(f"{few}: shuffling and stitching codes takes at least 2 images")
    result = evaluate_loaded(loaded, limit=limit, device=device)
    tokens = collect_tokens(loaded, limit, device)
    evaluator = Evaluator(task, run.data, run.eval, limit=limit)
    figures, seed = result["figures"], run.eval.seed
    partner = partners(count, seed)
    added = {"shuffled_codes": shuffled_predictions(oracle, task, tokens, partner)}
    if loaded.lm is not None:
        added["lm_shuffled_codes"] = shuffled_lm_predictions(loaded, limit, device, partner)
    if not sees_image(oracle):
        added["zero_codes"] = context_predictions(oracle, task)
    figures |= {name: evaluator.run(predict, device, title=f"evaluating {name}") for name, predict in added.items()}
    descriptions = {name: text for name, text in describe_predictions(oracle, count).items() if name in figures}
    result |= {"seed": seed, "descriptions": descriptions, "figures": {name: figures[name] for name in descriptions}}
    if isinstance(run, LMRun):
        checkpoint = resolve_checkpoint(find_oracle(loaded.checkpoint, run))
        result["oracle_sha256"] = file_hash(checkpoint / "model.safetensors")
    if processes.is_main():
        write_pages(out, loaded, result, draw(loaded, result, tokens, device))
    return result
