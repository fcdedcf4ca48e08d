"""Evaluates a predict function on a split. Used by training and by `uvim-fsq evaluate`.

Results do not depend on the batch size or the number of processes: each process evaluates its share of the images, and
metrics are computed from sums and counts over all processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from uvim_fsq import processes
from uvim_fsq.config.schema import BasicEvalConfig, DataConfig, Run
from uvim_fsq.console import Bar
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.examination import Examiner
from uvim_fsq.evaluation.intervals import ImageStates, is_recordable
from uvim_fsq.inference.predictions import PredictFn, eval_autocast
from uvim_fsq.oracle.code_usage import CodeStatistics
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.tasks.base import Baseline, Matrix, OfficialResults, Task


class Evaluator:
    """Evaluates predict functions on the evaluation split, and gathers the task's metrics over all processes.

    Args:
        task: the task.
        data: where the images are; `eval_split` is evaluated.
        config: batch size, workers and precision.
        limit: evaluate only the first images; None means `eval.limit`.
        quantizer: if given, also count the codes it uses.
        record: keep what each image added to the metric, for intervals, unless that is too much.

    Attributes:
        source: the samples of the split.
        protocol: the evaluation protocol, set by `run`.
        metric_details: `Metric.details`, set by `run`.
        rows: metrics of each image of this process, set by `run`.
        states: what each image of this process added to the metric, set by `run`.
        matrices: `Metric.matrices` over all processes, set by `run`.
        statistics: code counts over all processes, or None.
    """

    def __init__(
        self,
        task: Task,
        data: DataConfig,
        config: BasicEvalConfig,
        *,
        limit: int | None = None,
        quantizer: Quantizer | None = None,
        record: bool = False,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.limit = limit if limit is not None else config.limit
        self.source = task.source(data.root, data.eval_split)
        self.protocol = ""
        self.metric_details: dict[str, Any] = {}
        self.statistics = CodeStatistics(quantizer) if quantizer is not None else None
        self.rows: list[dict[str, Any]] = []
        self.states, self.record = ImageStates(), record
        self.matrices: dict[str, Matrix] = {}

    @torch.inference_mode()
    def run(
        self,
        predict: PredictFn,
        device: torch.device,
        official: OfficialResults | None = None,
        title: str = "evaluating",
        examiner: Examiner | None = None,
    ) -> dict[str, float]:
        """Evaluates the split, or its first `limit` images, and returns the metrics. They are equal in all processes.

        For an LM they include the cross-entropy of the true tokens, in bits per token and per image (FSQ paper,
        Figure 3).

        Args:
            predict: the predict function.
            device: where it runs.
            official: a writer of the benchmark's own result files. Its scores are added as "official/NAME", in the main
                process only.
            title: label of the progress bar.
            examiner: gets all batches and predictions too.
        """
        metric = self.task.metric(self.source)
        self.protocol, self.metric_details = metric.protocol, metric.details
        self.rows, self.states = [], ImageStates()
        record = self.record and is_recordable(metric)
        entries: list[Any] = []
        cost = np.zeros(3)  # bits, images, tokens
        for batch, samples in self.batches(device, title):
            with eval_autocast(self.config, device):
                predicted = predict(batch)
            for item, sample in zip(predicted.items, samples, strict=True):
                before = metric.state() if record else {}
                self.rows.append({"id": sample.id, **metric.update(item, sample)})
                if record:
                    self.states.add(sample.id, before, metric.state())
                if official is not None:
                    entries.append(official.add(item, sample))
            if examiner is not None:
                examiner.add(batch, predicted, samples)
            if predicted.bits is not None and predicted.tokens is not None:
                bits = predicted.bits.double().cpu().numpy()
                cost += [bits.sum(), len(bits), predicted.tokens.numel()]
            if self.statistics is not None and predicted.tokens is not None:
                self.statistics.update(predicted.tokens)
        metric.load_state(sum_over_processes(metric.state()))
        figures = metric.compute() | self._code_figures(cost)
        self.matrices = metric.matrices()
        if official is not None:
            entries = [entry for part in processes.gather(entries) for entry in part]
            scores = _official_scores(official, entries) if processes.is_main() else {}
            figures |= {f"official/{name}": value for name, value in scores.items()}
        return figures

    def batches(self, device: torch.device, title: str) -> Iterator[tuple[Batch, list[Sample]]]:
        """Each batch of this process's images, on the device, and its samples at native size, with a progress bar.

        Args:
            device: where the batches go.
            title: label of the progress bar.
        """
        state = processes.state()
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
        done = 0
        with Bar(title, count) as bar:
            for batch, samples in batches:
                bar.update(min(done * state.num_processes, count))
                yield to_device(batch, device), samples
                done += len(samples)

    def _code_figures(self, cost: np.ndarray) -> dict[str, float]:
        """Code usage and bits of the true tokens over all processes; `cost`: this one's bits, images and tokens."""
        figures: dict[str, float] = {}
        if self.statistics is not None:
            self.statistics.load_state(sum_over_processes(self.statistics.state()))
            if self.statistics.counts.any():
                figures |= self.statistics.compute()
        bits, images, tokens = sum_over_processes({"cost": cost})["cost"]
        if images:
            figures |= {"bits_per_token": float(bits / tokens), "bits_per_image": float(bits / images)}
        return figures


class _WithProgress:
    """A sample source that updates a progress bar as its samples are read in order."""

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
    """Builds the task's trivial baseline from the training split; None if the task has none."""
    with Bar("baseline: reading the training split") as bar:
        source: Any = _WithProgress(task.source(run.data.root, run.data.train_split), bar)
        return task.baseline(source, run.data.image_size)


def _official_scores(official: OfficialResults, entries: list[Any]) -> dict[str, float]:
    """The scores of the benchmark's program. If it fails, warns instead of losing our own results."""
    try:
        return official.finish(entries)
    except UserError as error:
        warnings.warn(f"no official scores: {error}", stacklevel=2)
        return {}


def sum_over_processes(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums each array over all processes."""
    states = processes.gather(state)
    return {name: np.sum([other[name] for other in states], axis=0) for name in state}
