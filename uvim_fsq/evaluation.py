"""One way to evaluate, used by the training loop, the command and the quickstart.

Figures do not depend on batch size or process count: metrics add up sums and counts,
and every process sees its own share of the images.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import uvim_fsq
from uvim_fsq import files, processes
from uvim_fsq.config import DataConfig, EvalConfig, LMRun, Run
from uvim_fsq.config_io import to_dict
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.layers import signed_pixels
from uvim_fsq.lm.generate import Decoder, Sampling
from uvim_fsq.lm.model import LM
from uvim_fsq.memory import EVALUATION, enough_memory
from uvim_fsq.models import Loaded, load_checkpoint
from uvim_fsq.oracle.fsq import FSQ
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.statistics import CodeStatistics
from uvim_fsq.oracle.vq import VQ
from uvim_fsq.progress import Bar
from uvim_fsq.report import write_evaluation
from uvim_fsq.run_dirs import file_hash
from uvim_fsq.tasks.base import Baseline, OfficialResults, Task

#: What of `eval.` may change the figures; named by each result.
DECODING_KEYS = ("temperature", "top_k", "top_p", "seed", "precision", "int8_memory")


@dataclass
class Predicted:
    """Predictions of one batch, one item per image as `Task.decode` gives them, and the tokens behind them (B, L).

    `bits` (B,): what the true tokens cost under an LM.
    """

    items: list[Any]
    tokens: torch.Tensor | None
    bits: torch.Tensor | None = None


Predictor = Callable[[Batch], Predicted]


def label_maps(oracle: Oracle, task: Task, codes: torch.Tensor, image: torch.Tensor) -> list[Any]:
    """Codes (B, L, d) and images -> one prediction each, as `Task.decode` gives them."""
    return [item for logits in oracle.logits_in_pieces(codes, image) for item in task.decode(logits)]


def oracle_predictions(oracle: Oracle, task: Task) -> Predictor:
    """The oracle alone: labels -> tokens -> labels."""

    def predict(batch: Batch) -> Predicted:
        tokens = oracle.tokenize(batch["labels"], batch["image"])
        codes = oracle.quantizer.indices_to_codes(tokens)
        return Predicted(label_maps(oracle, task, codes, batch["image"]), tokens)

    return predict


def context_predictions(oracle: Oracle, task: Task) -> Predictor:
    """The oracle's decoder with every code zeroed: what the image alone gives away (PITFALLS: context leak)."""

    def predict(batch: Batch) -> Predicted:
        image = batch["image"]
        codes = torch.zeros(len(image), oracle.code_length, oracle.quantizer.dim, device=image.device)
        return Predicted(label_maps(oracle, task, codes, image), None)

    return predict


def build_decoder(lm: LM, config: EvalConfig) -> Decoder:
    """The decoding that a configuration asks for."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    return Decoder(lm, sampling, precision=config.precision, int8=config.int8_memory, compile=config.compile)


def arithmetic(config: EvalConfig, device: torch.device) -> torch.autocast:
    """The context in which predictions are made: `eval.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def lm_predictions(lm: LM, oracle: Oracle, task: Task, config: EvalConfig) -> Predictor:
    """The whole system: image -> LM tokens -> oracle decoder. Each image samples from its own random stream."""
    decoder = build_decoder(lm, config)

    def cost(batch: Batch) -> torch.Tensor:
        truth = oracle.tokenize(batch["labels"], batch["image"])
        # Not `lm(...)`: while it is trained, Accelerate has put training's precision around its forward.
        logits = lm.decode(truth, lm.encode(batch["image"])).float()
        return F.cross_entropy(logits.transpose(1, 2), truth, reduction="none").sum(1) / math.log(2)

    def predict(batch: Batch) -> Predicted:
        seeds = config.seed * 1_000_003 + batch["index"].cpu()
        tokens = decoder(batch["image"], seeds)
        codes = oracle.quantizer.indices_to_codes(tokens)
        return Predicted(label_maps(oracle, task, codes, batch["image"]), tokens, cost(batch))

    return predict


def baseline_predictions(baseline: Baseline) -> Predictor:
    """The task's trivial prediction."""

    def predict(batch: Batch) -> Predicted:
        images = batch["image"].cpu().numpy().transpose(0, 2, 3, 1)
        return Predicted([baseline.predict(image) for image in images], None)

    return predict


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves image and labels, and makes real labels of 8 bits float32 in [-1, 1]; ids and indices stay on the host."""
    labels = {name: x.to(device, non_blocking=True) for name, x in batch["labels"].items()}
    labels = {n: signed_pixels(x) if x.ndim == 4 else x for n, x in labels.items()}
    return Batch(
        image=batch["image"].to(device, non_blocking=True), labels=labels, index=batch["index"], id=batch["id"]
    )


class Evaluator:
    """Runs predictions over the evaluation split and gathers the task's figures over all processes.

    After `run`, `rows` holds each image's own figures (this process's images), `statistics` the token counts.
    """

    def __init__(
        self,
        task: Task,
        data: DataConfig,
        config: EvalConfig,
        *,
        limit: int | None = None,
        quantizer: FSQ | VQ | None = None,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.limit = limit if limit is not None else config.limit
        self.source = task.source(data.root, data.eval_split)
        self.protocol = ""
        self.statistics = CodeStatistics(quantizer) if quantizer is not None else None
        self.rows: list[dict[str, Any]] = []

    @torch.inference_mode()
    def run(
        self,
        predict: Predictor,
        device: torch.device,
        official: OfficialResults | None = None,
        title: str = "evaluating",
    ) -> dict[str, float]:
        """The figures over the split (or its first `limit` images), the same on every process.

        For an LM also the cross-entropy of the true tokens, in bits per token and per image (FSQ paper, Figure 3).

        With `official` also those of the benchmark's own program, as `official/NAME`, on the main process. `title`
        stands in front of the bar.
        """
        state = processes.state()
        metric = self.task.metric(self.source)
        self.protocol = metric.protocol
        self.rows = []
        entries: list[Any] = []
        cost = np.zeros(3)  # bits, images, tokens
        count = len(self.source) if self.limit is None else min(self.limit, len(self.source))
        batches = eval_batches(
            self.source,
            self.task,
            self.data,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            limit=self.limit,
            rank=state.process_index,
            world=state.num_processes,
        )
        with Bar(title, count) as bar:
            for batch, samples in batches:
                bar.update(min(len(self.rows) * state.num_processes, count))
                with arithmetic(self.config, device):
                    predicted = predict(to_device(batch, device))
                for item, sample in zip(predicted.items, samples, strict=True):
                    self.rows.append({"id": sample.id, **metric.update(item, sample)})
                    if official is not None:
                        entries.append(official.add(item, sample))
                if predicted.bits is not None and predicted.tokens is not None:
                    bits = predicted.bits.double().cpu().numpy()
                    cost += [bits.sum(), len(bits), predicted.tokens.numel()]
                if self.statistics is not None and predicted.tokens is not None:
                    self.statistics.update(predicted.tokens)
        metric.load_state(_summed(metric.state()))
        figures = metric.compute()
        if self.statistics is not None:
            self.statistics.load_state(_summed(self.statistics.state()))
            if self.statistics.counts.any():
                figures |= self.statistics.compute()
        bits, images, tokens = _summed({"cost": cost})["cost"]
        if images:
            figures |= {"bits_per_token": float(bits / tokens), "bits_per_image": float(bits / images)}
        if official is not None:
            entries = [entry for part in processes.gather(entries) for entry in part]
            theirs = _score(official, entries) if processes.is_main() else {}
            figures |= {f"official/{name}": value for name, value in theirs.items()}
        return figures


class _Shown:
    """A source with a bar of the samples taken from it in their order."""

    def __init__(self, source: SampleSource, bar: Bar) -> None:
        self.source, self.bar = source, bar

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        self.bar.update(index, len(self.source))
        return self.source[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def make_baseline(task: Task, run: Run) -> Baseline | None:
    """The task's trivial prediction, from the training split."""
    with Bar("baseline: reading the training split") as bar:
        source: Any = _Shown(task.source(run.data.root, run.data.train_split), bar)
        return task.baseline(source, run.data.image_size)


def _score(official: OfficialResults, entries: list[Any]) -> dict[str, float]:
    """The official figures; that program's refusal must not cost our own."""
    try:
        return official.finish(entries)
    except UserError as error:
        warnings.warn(f"no official figures: {error}", stacklevel=2)
        return {}


def _summed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums of every array over all processes."""
    states = processes.gather(state)
    return {name: np.sum([other[name] for other in states], axis=0) for name in state}


def ways_to_predict(loaded: Loaded) -> dict[str, Predictor]:
    """Oracle, context alone (where the decoder has context) and, for an LM's checkpoint, the LM."""
    task, oracle = loaded.task, loaded.oracle
    ways: dict[str, Predictor] = {"oracle": oracle_predictions(oracle, task)}
    if oracle.config.context in ("both", "decoder"):
        ways["context_only"] = context_predictions(oracle, task)
    if loaded.lm is not None:
        ways["lm"] = lm_predictions(loaded.lm, oracle, task, loaded.run.eval)
    return ways


def evaluate_loaded(
    loaded: Loaded,
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
    ways = ways_to_predict(loaded)
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
        **_circumstances(loaded, evaluator, device),
        "checkpoint_sha256": checkpoint_sha256,
        "baseline": trivial.name if trivial is not None else None,
        "limit": limit,
        "images": len(next(iter(rows.values()))),
        "figures": figures,
        "code_counts": counts,
        "level_histogram": levels,
    }


def _circumstances(loaded: Loaded, evaluator: Evaluator, device: torch.device) -> dict[str, Any]:
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
            "uvim_fsq": uvim_fsq.__version__,
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


def evaluate_run(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    csv: Path | None = None,
    baseline: bool = False,
    official: Path | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint (see `load_checkpoint`; or a given one) by its task's protocol.

    Refuses an unreadable image.

    `csv`, `baseline` and `official` are those of `evaluate_loaded`; `report` is an HTML page to write.
    """
    device = processes.device()
    limited = [] if limit is None else [f"eval.limit={limit}"]
    loaded = load_checkpoint(run_dir, [*overrides, *limited], device)
    loaded.run = replace(loaded.run, data=replace(loaded.run.data, max_bad_samples=0))
    with enough_memory(EVALUATION):
        result = evaluate_loaded(loaded, csv_file=csv, device=device, baseline=baseline, official=official)
    if report is not None and processes.is_main():
        runs = {loaded.run.stage: loaded.checkpoint.parent.parent}
        if isinstance(loaded.run, LMRun):
            runs = {"oracle": Path(loaded.run.oracle), **runs}
        write_evaluation(report, f"{loaded.task.name}: {result['protocol']}", loaded, result, runs, device)
    return result
