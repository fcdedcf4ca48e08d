"""Chooses the decoding settings of an LM on a hold-out, for `uvim-fsq tune`.

The tokens of an image are generated once and decoded for all settings; each setting has its own metric, so that one
pass over the images measures them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from uvim_fsq import processes
from uvim_fsq.checkpoints.hub import refuse_downloaded
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash, resolve_checkpoint
from uvim_fsq.checkpoints.tuned import DECODING, TUNED_KEYS, tuning_split
from uvim_fsq.config.rules import check_context_weight, validate
from uvim_fsq.config.schema import EvalConfig, Run
from uvim_fsq.data.sample import Batch, Sample
from uvim_fsq.errors import EVALUATION_REMEDY, UserError, enough_memory
from uvim_fsq.evaluation.evaluator import Evaluator, sum_over_processes
from uvim_fsq.evaluation.run import provenance
from uvim_fsq.files import write_json
from uvim_fsq.inference.code_decoding import LMDecoder, LogitMean, Logits, Part, decode_part, image_seeds
from uvim_fsq.inference.predictions import eval_autocast
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.tasks.base import Metric, Task

#: (codes, code_scale) of a setting.
Variant = tuple[str, float]


@dataclass(frozen=True)
class Grid:
    """The values to try. The run's own settings are always tried.

    Attributes:
        codes: values of `eval.codes`.
        scales: values of `eval.code_scale`.
        weights: values of `eval.context_weight`; None means 0 to 0.5, or 0 if there is no context alone.
        steps: values of `eval.steps` besides the run's own.
        samples: values of `eval.samples` besides the run's own.
        temperature: `eval.temperature` of these samples.
    """

    codes: tuple[str, ...] = ("hard", "soft")
    scales: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    weights: tuple[float, ...] | None = None
    steps: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    temperature: float = 1.0

    def settings(self, own: EvalConfig, *, has_context: bool) -> list[EvalConfig]:
        """All settings to try, from simple to elaborate: the first is the run's own, `own`."""
        weights = self.weights
        if weights is None:
            weights = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5) if has_context else (0.0,)
        sampled = [replace(own, samples=count, temperature=self.temperature) for count in sorted(self.samples)]
        tried = [
            replace(base, steps=steps, codes=codes, code_scale=scale, context_weight=weight)
            for base in (own, *sampled)
            for steps in (own.steps, *sorted(self.steps))
            for codes in sorted(self.codes)
            for scale in sorted(self.scales, key=lambda scale: abs(1 - scale))
            for weight in sorted(weights)
        ]
        return list(dict.fromkeys([own, *tried]))


@dataclass
class Search:
    """Measures settings on batches of images.

    Args:
        loaded: the LM's checkpoint.
        metrics: setting -> an empty accumulator; None -> that of context alone, if the oracle's decoder sees the image.
    """

    loaded: LoadedRun
    metrics: Mapping[EvalConfig | None, Metric]
    decoders: dict[Sampling, LMDecoder] = field(init=False)
    groups: dict[Sampling, dict[Variant, list[EvalConfig]]] = field(init=False)

    def __post_init__(self) -> None:
        loaded = self.loaded
        assert loaded.lm is not None
        self.decoders, self.groups = {}, {}
        settings = [setting for setting in self.metrics if setting is not None]
        soft = any(setting.codes == "soft" for setting in settings)
        for setting in settings:
            sampling = Sampling.of(setting)
            if sampling not in self.decoders:
                generation = replace(setting, codes="soft" if soft else "hard")
                self.decoders[sampling] = LMDecoder(loaded.lm, loaded.oracle, loaded.task, generation)
            variants = self.groups.setdefault(sampling, {})
            variants.setdefault((setting.codes, setting.code_scale), []).append(setting)

    @torch.inference_mode()
    def update(self, batch: Batch, samples: Sequence[Sample]) -> None:
        """Adds a batch, on the device, with its samples at native size."""
        image, own = batch["image"], self.loaded.run.eval
        with eval_autocast(own, image.device):
            parts = {
                sampling: self._generate(sampling, image, image_seeds(own.seed, batch["index"]))
                for sampling in self.decoders
            }
            decoder = next(iter(self.decoders.values()))
            nothing = decoder.context_part(len(image))
            for rows in decoder.oracle.image_chunks(len(image)):
                context: Logits = {}
                if None in self.metrics:
                    context = decode_part(nothing, image, rows)
                    self._score(None, context, samples[rows])
                for sampling, drawn in parts.items():
                    for variant, settings in self.groups[sampling].items():
                        chosen = [given[variant] for given in drawn]
                        self._try(settings, chosen, image, rows, context, samples[rows])

    def _generate(self, sampling: Sampling, image: torch.Tensor, seeds: torch.Tensor) -> list[dict[Variant, Part]]:
        """For each sample, the codes of every variant."""
        decoder, variants = self.decoders[sampling], self.groups[sampling]
        count = max(setting.samples for settings in variants.values() for setting in settings)
        drawn: list[dict[Variant, Part]] = []
        for number in range(count):
            generated = decoder.generate(image, seeds, number)
            drawn.append({variant: decoder.code_part(generated, *variant) for variant in variants})
        return drawn

    def _try(
        self,
        settings: Sequence[EvalConfig],
        parts: Sequence[Part],
        image: torch.Tensor,
        rows: slice,
        context: Logits,
        samples: Sequence[Sample],
    ) -> None:
        """Scores settings of the same codes and scale; `parts` are the samples, in order."""
        mean = LogitMean(self.loaded.task.label_channels)
        for count, part in enumerate(parts, 1):
            logits = decode_part(part, image, rows)
            if len(parts) > 1:
                mean.add(logits)
            predicted = logits if count == 1 else mean.logits()
            for setting in settings:
                if setting.samples == count:
                    self._score(setting, self._mix(predicted, context, setting.context_weight), samples)

    def _mix(self, logits: Logits, context: Logits, weight: float) -> Logits:
        if weight in (0, 1):
            return context if weight else logits
        mean = LogitMean(self.loaded.task.label_channels)
        mean.add(logits, 1 - weight)
        mean.add(context, weight)
        return mean.logits()

    def _score(self, setting: EvalConfig | None, logits: Logits, samples: Sequence[Sample]) -> None:
        metric = self.metrics[setting]
        for item, sample in zip(self.loaded.task.decode(logits), samples, strict=True):
            metric.update(item, sample)


def measure(
    loaded: LoadedRun, evaluator: Evaluator, settings: Sequence[EvalConfig | None], device: torch.device
) -> dict[EvalConfig | None, dict[str, float]]:
    """The metrics of each setting, and of context alone for None, over the evaluator's images and all processes."""
    metrics = {setting: loaded.task.metric(evaluator.source) for setting in settings}
    search = Search(loaded, metrics)
    for batch, samples in evaluator.batches(device, "tuning"):
        search.update(batch, samples)
    figures: dict[EvalConfig | None, dict[str, float]] = {}
    for setting, metric in metrics.items():
        evaluator.protocol = metric.protocol
        metric.load_state(sum_over_processes(metric.state()))
        figures[setting] = metric.compute()
    return figures


def best_setting(values: Mapping[EvalConfig, float], *, smaller_is_better: bool) -> EvalConfig:
    """The setting with the best value, the first of equals. Raises UserError if no value is a number."""
    finite = {setting: value for setting, value in values.items() if math.isfinite(value)}
    if not finite:
        raise UserError("no setting has a finite result on the hold-out; evaluate the run to see why")
    return min(finite, key=lambda setting: finite[setting] if smaller_is_better else -finite[setting])


def tune(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    unseen: bool = False,
    limit: int | None = None,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Chooses the decoding settings of an LM on a hold-out and writes them to its checkpoint, as decoding.json.

    `load_checkpoint` applies them from then on. The settings with the best main metric win; of equal ones the first in
    the order of `Grid.settings`.

    Args:
        run_dir: a run, whose checkpoint is chosen as in `load_checkpoint`, or a checkpoint directory.
        overrides: `key=value` strings, e.g. "task.decoding=expectation".
        split: the hold-out; by default `data.selection_split`.
        unseen: `data.root` holds other images than those of the run; see `tuning_split`.
        limit: use only the first images; None means `eval.limit`.
        grid: the values to try.

    Returns the content of the file. Raises UserError for a run without a hold-out, for a task whose protocol reports no
    metric that may choose, and for invalid values.
    """
    refuse_downloaded(run_dir, "tune writes the settings into the run")
    split = tuning_split(resolve_checkpoint(run_dir), overrides, split, unseen=unseen)
    limited = [] if limit is None else [f"eval.limit={limit}"]
    device = processes.device()
    loaded = load_checkpoint(run_dir, [*overrides, *limited], device, tuned=False)
    metric = _choosing_metric(loaded.task)
    settings = checked_settings(loaded, grid or Grid())
    has_context = loaded.oracle.config.context in ("both", "decoder")
    sha256 = file_hash(loaded.checkpoint / "model.safetensors")
    processes.same(sha256, loaded.checkpoint)
    data = replace(loaded.run.data, eval_split=split, max_bad_samples=0)
    evaluator = Evaluator(loaded.task, data, loaded.run.eval)
    with enough_memory(EVALUATION_REMEDY):
        figures = measure(loaded, evaluator, [*([None] if has_context else []), *settings], device)
    values = {setting: figures[setting][metric] for setting in settings}
    best = best_setting(values, smaller_is_better=loaded.task.smaller_is_better)
    count = len(evaluator.source)
    result = {
        "settings": _tuned(best),
        "split": split,
        "other_root": loaded.run.data.root if unseen else "",
        "images": count if evaluator.limit is None else min(evaluator.limit, count),
        "limit": evaluator.limit,
        "metric": metric,
        "smaller_is_better": loaded.task.smaller_is_better,
        "value": values[best],
        "own": {**_tuned(settings[0]), metric: values[settings[0]]},
        "context_only": figures[None][metric] if has_context else None,
        "candidates": [{**_tuned(setting), metric: value} for setting, value in values.items()],
        "checkpoint_sha256": sha256,
        **provenance(loaded, evaluator, device),
    }
    if processes.is_main():
        write_json(loaded.checkpoint / DECODING, result)
    return result


def _choosing_metric(task: Task) -> str:
    if task.choosing_metric is None:
        raise UserError(
            f"task {task.name}: this protocol reports a metric by which nothing is chosen; set eval.codes and the "
            f"other keys yourself, or tune by a protocol that reports {task.main_metric}"
        )
    return task.choosing_metric


def checked_settings(loaded: LoadedRun, grid: Grid) -> list[EvalConfig]:
    """All settings to try. Raises UserError for values out of range, and for weights without a context to mix with."""
    context = loaded.oracle.config.context
    check_context_weight(max(grid.weights or (0.0,)), context, "of this run")
    run: Run = loaded.run
    settings = grid.settings(run.eval, has_context=context in ("both", "decoder"))
    for setting in settings:
        validate(replace(run, eval=setting), run)
    return settings


def _tuned(setting: EvalConfig) -> dict[str, Any]:
    return {key: getattr(setting, key) for key in TUNED_KEYS}
