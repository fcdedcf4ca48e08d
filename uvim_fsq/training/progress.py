"""Progress of training: printed lines and a progress bar, metrics.jsonl, TensorBoard and other trackers.

Only the main process prints and writes.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uvim_fsq.config.schema import TrainConfig
from uvim_fsq.console import LINES, Bar, clear, say
from uvim_fsq.files import read_json_lines, write_text
from uvim_fsq.training.trackers import Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class Progress:
    """Prints and logs the progress of one run.

    Args:
        train: the training settings.
        title: the name of the stage.
        total: optimizer steps of the whole run.
        start_step: the step to continue from; later lines of metrics.jsonl are dropped.
        main: whether this is the main process.
        peak_rate: images/s of all devices together if they ran at the rate of a large matrix product; for the MFU.
        unevaluated: also drop the evaluation at `start_step`, because it will be repeated.
        settings: the configuration, flat, for trackers.
    """

    def __init__(
        self,
        train: TrainConfig,
        title: str,
        total: int,
        start_step: int,
        *,
        main: bool,
        peak_rate: float | None = None,
        unevaluated: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.train, self.title, self.total, self.main, self.peak_rate = train, title, total, main, peak_rate
        self.last_step, self.last_time = start_step, time.perf_counter()
        # In a log file, the bar prints only if the lines of `log` are far apart.
        self.bar, self.last_line = Bar(title, total, start_step, every=2 * LINES), -math.inf
        self.waiting = 0.0
        self.out = Path(train.out)
        self.start_step = start_step
        if not main:
            return
        self._truncate(start_step, unevaluated)
        self.trackers = Trackers(train, settings or {})

    @functools.cached_property
    def writer(self) -> SummaryWriter:
        """TensorBoard's writer, made when there is something to write: its import delays the first step."""
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start_step + 1)

    def _truncate(self, step: int, unevaluated: bool) -> None:
        file = self.out / "metrics.jsonl"
        kept = [line for line in read_json_lines(file) if isinstance(line.get("step"), int) and line["step"] <= step]
        if unevaluated:
            kept = [line for line in kept if line["step"] < step or not any(key.startswith("eval/") for key in line)]
        write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))

    def waited(self, seconds: float) -> None:
        """Adds seconds spent waiting for data."""
        self.waiting += seconds

    def stepped(self, step: int) -> None:
        """Updates the bar, without host synchronization."""
        if self.main:
            self.bar.update(step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs `values` for the steps up to `step`, and prints them every few seconds.

        Adds images/s, the MFU (model FLOPs utilization) and the fraction of time spent waiting for data.
        """
        now = time.perf_counter()
        elapsed = max(now - self.last_time, 1e-9)
        rate = (step - self.last_step) * self.train.batch_size / elapsed
        speed = {"images_per_second": rate}
        if self.peak_rate is not None:
            speed["mfu"] = rate / self.peak_rate
        speed["data_wait"] = min(1.0, self.waiting / elapsed)
        self.last_step, self.last_time, self.waiting = step, now, 0.0
        if not self.main:
            return
        self._write(step, {**values, **speed})
        if now - self.last_line < LINES and step < self.total:
            return
        self.last_line = now
        text = f"{self.title} {step}/{self.total}  eta {self.bar.eta(step)}  {rate:.0f} images/s"
        if "mfu" in speed:
            text += f"  mfu {speed['mfu']:.0%}"
        text += "  " + "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        text += f"  data {speed['data_wait']:.0%}"
        self.say(text)

    def evaluated(self, step: int, figures: dict[str, float], panel: np.ndarray | None, seconds: float) -> None:
        """Logs and prints the metrics of an evaluation, which took `seconds`; `panel` is (H, W, 3) uint8."""
        self.last_time += seconds  # evaluation does not count as training time
        self.bar.pause(seconds)
        if not self.main:
            return
        self._write(step, {f"eval/{name}": value for name, value in figures.items()})
        if panel is not None:
            self.writer.add_image("panel", panel, step, dataformats="HWC")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"{self.title} {step}/{self.total}  evaluation: {shown}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.main:
            say(text)
            self.bar.wait()

    def _write(self, step: int, values: dict[str, float]) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.trackers.log(step, values)

    def close(self) -> None:
        """Clears the bar and closes the writers."""
        if not self.main:
            return
        clear()
        if "writer" in vars(self):
            self.writer.close()
        self.trackers.close()
