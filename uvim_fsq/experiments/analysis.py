"""What a run's codes are, and how much its predictions hang on them: figures and the page of `uvim-fsq analyze`.

Knows tasks by their interface only; the pictures are made in `code_pictures`. L code length, N evaluated images.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.checkpoints.identity import describe
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash, find_oracle, resolve_checkpoint
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
from uvim_fsq.inference.predictions import PredictFn, Predictions, context_predictions, label_maps
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.tasks.base import Task


def partners(count: int, seed: int) -> np.ndarray:
    """(count,) int64: whose codes each image gets. One random cycle, hence a permutation without fixed points."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


@torch.inference_mode()
def collect_tokens(loaded: LoadedRun, limit: int | None, device: torch.device) -> np.ndarray:
    """The oracle's tokens of the evaluation images, (N, L) int64 in the source's order, whole on every process."""
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
    mine: dict[int, np.ndarray] = {}
    count = min(limit or len(source), len(source))
    with Bar("tokens", count) as bar:
        for batch, _ in batches:
            bar.update(min(len(mine) * state.num_processes, count))
            batch = to_device(batch, device)
            tokens = loaded.oracle.tokenize(batch["labels"], batch["image"]).cpu().numpy()
            mine |= zip(batch["index"].tolist(), tokens, strict=True)
    everyone = {index: row for part in processes.gather(mine) for index, row in part.items()}
    return np.stack([everyone[index] for index in sorted(everyone)])


def shuffled_predictions(oracle: Oracle, task: Task, tokens: np.ndarray, partner: np.ndarray) -> PredictFn:
    """The decoder with each image's own context but another image's codes, tokens[partner[i]]."""

    def predict(batch: Batch) -> Predictions:
        given = torch.from_numpy(tokens[partner[batch["index"].numpy()]]).to(batch["image"].device)
        codes = oracle.quantizer.indices_to_codes(given)
        return Predictions(label_maps(oracle, task, codes, batch["image"]), given)

    return predict


def describe_ways(oracle: Oracle, images: int) -> dict[str, str]:
    """What each figure means. All codes zero and the context alone are one prediction, so only one name is there."""
    quantizer, dropout = oracle.quantizer, oracle.config.code_dropout
    if sees_image(oracle):
        name, zero = "context_only", "all codes zero, so the image alone: zero codes and context alone are one thing"
    else:
        name, zero = "zero_codes", "all codes zero: the decoder sees no image either, so one constant prediction"
    zero += f"; trained for by code dropout ({dropout})" if dropout != "none" else "; code dropout was off in training"
    zero_codes = torch.zeros(quantizer.dim, device=quantizer.device)
    code = int(quantizer.codes_to_indices(zero_codes))
    if not quantizer.codebook()[code].any():
        zero += f"; code {code} of the codebook is zero, too"
    own = "its own image with " if sees_image(oracle) else ""
    return {
        "oracle": "each image's own codes, made from its labels",
        "shuffled_codes": f"{own}another image's codes: one random cycle through all {images} images",
        name: zero,
        "lm": "codes predicted by the language model",
    }


def _save_picture(picture: np.ndarray | Figure, file: Path) -> None:
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", dpi=100, bbox_inches="tight")
    else:
        Image.fromarray(picture).save(file, format="PNG")


def write_pages(out: Path, loaded: LoadedRun, result: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """analysis.json, report.html and the pictures as PNG files into `out`."""
    write_json(out / "analysis.json", result)
    names = (loaded.task.main_metric, *loaded.task.secondary_metrics, "codebook_usage", "code_perplexity")
    rows = [["", *names, "what it is"]]
    for way, figures in result["figures"].items():
        values = [f"{figures[name]:.3f}" if name in figures else "" for name in names]
        rows.append([way.replace("_", " "), *values, result["ways"][way]])
    facts = {
        "protocol": result["protocol"],
        "data": ", ".join(f"{key} {value}" for key, value in result["data"].items()),
        "images": f"{result['images']}" + (f" (the first {result['limit']})" if result["limit"] else ""),
        "seed": str(result["seed"]),
        **({"settings": describe(result["overrides"])} if result["overrides"] else {}),
        **{key: result[key][:16] for key in ("checkpoint_sha256", "oracle_sha256") if key in result},
    }
    lines = "<br>".join(f"{key}: <code>{html.escape(value)}</code>" for key, value in facts.items())
    sections = [("How much hangs on the codes", f"{html_table(rows)}<p>{lines}</p>")]
    for item in pictures:
        write_whole(out / f"{item.name}.png", functools.partial(_save_picture, item.picture))
        sections.append((item.heading, f"<p>{html.escape(item.caption)}</p>{png_tag(item.picture, item.name)}"))
    legend = loaded.task.legend()
    if legend is not None:
        sections.append(("Colours", png_tag(legend, "legend")))
    write_report(out / "report.html", f"{loaded.task.name}: what the codes are", sections)


def analyze_run(
    run_dir: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Analyses the checkpoint of a run of either stage (or a given one) and writes it to `out` (RUN/analysis).

    Returns what analysis.json holds: `evaluate_loaded`'s result with the figures `shuffled_codes` and, where the
    decoder sees no image, `zero_codes`; `ways` says what each is. Raises UserError for fewer than 2 evaluation images.
    """
    out = out or Path(run_dir) / "analysis"
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
        raise UserError(f"{few}: codes can be shuffled and stitched between at least 2 images only")
    result = evaluate_loaded(loaded, limit=limit, device=device)
    tokens = collect_tokens(loaded, limit, device)
    evaluator = Evaluator(task, run.data, run.eval, limit=limit)
    figures, seed = result["figures"], run.eval.seed
    more = {"shuffled_codes": shuffled_predictions(oracle, task, tokens, partners(count, seed))}
    if not sees_image(oracle):
        more["zero_codes"] = context_predictions(oracle, task)
    figures |= {name: evaluator.run(predict, device, title=f"evaluating {name}") for name, predict in more.items()}
    ways = {way: text for way, text in describe_ways(oracle, count).items() if way in figures}
    result |= {"seed": seed, "ways": ways, "figures": {way: figures[way] for way in ways}}
    if isinstance(run, LMRun):
        place = resolve_checkpoint(find_oracle(loaded.checkpoint, run))
        result["oracle_sha256"] = file_hash(place / "model.safetensors")
    if processes.is_main():
        write_pages(out, loaded, result, draw(loaded, result, tokens, device))
    return result
