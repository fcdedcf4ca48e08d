"""The jobs of `uvim-fsq benchmark`, and the measurements that each consists of."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from uvim_fsq import processes
from uvim_fsq.benchmark import JOBS
from uvim_fsq.benchmark.decoding import measure_decoding, precision_on
from uvim_fsq.benchmark.loader import measure_loader
from uvim_fsq.benchmark.metrics import measure_metrics
from uvim_fsq.benchmark.peers import read_peer, unmatched
from uvim_fsq.benchmark.predicting import measure_predicting, place_of_run, write_picture
from uvim_fsq.benchmark.setup import Sizes, fresh_lm, read_sizes, synthetic_batch
from uvim_fsq.benchmark.side_by_side import measure_side_by_side
from uvim_fsq.benchmark.start_up import measure_start_up
from uvim_fsq.benchmark.table import about, markdown, read_earlier, to_json
from uvim_fsq.benchmark.training import measure_training, stage_of, stepper_of, steps
from uvim_fsq.checkpoints.hub import is_hub, local_run
from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
from uvim_fsq.checkpoints.tuned import read_for_prediction
from uvim_fsq.errors import UserError
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.performance.device_peak import DevicePeak, measure_device_peak
from uvim_fsq.performance.timing import Measurement

#: The jobs that also take a run directory.
PREDICTING = ("start-up", "predict")
#: The jobs that need a language model.
NEED_LM = ("train-lm", "decode", "side-by-side", "start-up", "predict", "all")
#: Job -> why it takes no `--batch`.
WITHOUT_BATCH = {
    "metrics": "has no batch size",
    "start-up": "has no batch size",
    "loader": "takes train.batch_size",
}
BATCHES = {"cuda": (1, 16, 64, 256), "cpu": (1, 32)}


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure.

    Attributes:
        job: one of `JOBS`.
        sizes: the configurations; None for jobs without a model, and with `run`.
        batches: batch sizes of decoding and predicting; training uses the first. () means the defaults.
        repeats: timed repeats.
        run: a run directory to predict with, in place of random weights.
        overrides: `key=value` strings for this run.
        exports: folders of `uvim-fsq export` to measure beside the run.
    """

    job: str
    sizes: Sizes | None
    batches: tuple[int, ...] = ()
    repeats: int = 5
    run: Path | None = None
    overrides: tuple[str, ...] = ()
    exports: tuple[Path, ...] = ()


def read_request(
    job: str,
    config: str | Path | None,
    overrides: Sequence[str],
    *,
    oracle: Path | None = None,
    batches: tuple[int, ...] = (),
    repeats: int = 5,
    exports: tuple[Path, ...] = (),
) -> BenchmarkRequest:
    """Checks the arguments and reads the configuration.

    Raises:
        UserError: the job needs a configuration, or one of the other stage; a number is below 1; an argument that the
            job does not use.
    """
    if exports and job != "predict":
        raise UserError("--export works only with predict")
    if repeats < 1 or any(batch < 1 for batch in batches):
        raise UserError("--repeats and --batch must be at least 1")
    if batches and job in WITHOUT_BATCH:
        raise UserError(f"benchmark {job} {WITHOUT_BATCH[job]}; leave --batch out")
    if job == "metrics" and config is not None:
        raise UserError("benchmark metrics takes no configuration; leave it out")
    is_run = job in PREDICTING and config is not None and (is_hub(config) or Path(config).is_dir())
    if oracle is not None and (config is None or is_run):
        raise UserError("--oracle works only with the configuration of a language model")
    if job == "metrics" or (job == "start-up" and config is None):
        return BenchmarkRequest(job, None, batches, repeats)
    if is_run and config is not None:
        run = read_for_prediction(resolve_checkpoint(config), overrides)[0]
        if run.stage == "oracle":
            raise UserError(f"benchmark {job} needs a run that predicts; {config} is of stage oracle")
        return BenchmarkRequest(job, None, batches, repeats, local_run(config).absolute(), tuple(overrides), exports)
    if config is None:
        raise UserError(f"benchmark {job} needs a configuration, e.g. nyu_depth/lm")
    sizes = read_sizes(config, overrides, oracle)
    if job in NEED_LM and sizes.lm is None:
        raise UserError(f"benchmark {job} needs a configuration of stage lm; {config} is for stage oracle")
    if job == "train-oracle":
        sizes = Sizes(sizes.oracle, None)
    return BenchmarkRequest(job, sizes, batches, repeats, exports=exports)


def measure(request: BenchmarkRequest, say: Callable[[str], None]) -> tuple[list[Measurement], DevicePeak]:
    """Measures the device's peak rates, then runs the job."""
    device = processes.device()
    precision = request.sizes.run.train.precision if request.sizes and request.job.startswith("train") else "bf16"
    peak = measure_device_peak(device, precision)
    say(about(peak))
    lines: list[Measurement] = []
    for job in JOBS[:-1] if request.job == "all" else (request.job,):
        say(f"measuring {job}")
        try:
            lines += _measure(job, request, peak, device)
        except UserError as error:
            if request.job != "all":
                raise
            # Keep the results of the other jobs.
            say(f"not measured: {error}")
    return lines, peak


def _measure(job: str, request: BenchmarkRequest, peak: DevicePeak, device: torch.device) -> list[Measurement]:
    sizes, repeats = request.sizes, request.repeats
    if job == "metrics":
        return measure_metrics(repeats=repeats)
    batches = request.batches or BATCHES[device.type]
    if job in PREDICTING:
        return _measure_predicting(job, request, device, batches)
    assert sizes is not None
    if job == "decode":
        return measure_decoding(sizes, peak, device, batches=batches, repeats=repeats)
    if job == "side-by-side":
        # With larger batches, the naive loop takes minutes.
        batches = request.batches or [batch for batch in batches if batch <= 64]
        return measure_side_by_side(sizes, device, batches=batches, repeats=repeats)
    if job == "loader":
        return measure_loader(sizes.run, repeats=repeats)
    sizes = Sizes(sizes.oracle, None) if job == "train-oracle" else sizes
    return measure_training(sizes, peak, device, batch_size=_training_batch(request, sizes), repeats=repeats)


def _measure_predicting(
    job: str, request: BenchmarkRequest, device: torch.device, batches: Sequence[int]
) -> list[Measurement]:
    with place_of_run(request.sizes, request.run) as run, TemporaryDirectory(prefix="uvim-fsq-") as temporary:
        if job == "start-up":
            picture = write_picture(Path(temporary) / "picture.jpg")
            return measure_start_up(run, request.overrides, picture, repeats=request.repeats)
        assert run is not None
        return measure_predicting(
            run, request.overrides, device, batches=batches, repeats=request.repeats, exports=request.exports
        )


def _training_batch(request: BenchmarkRequest, sizes: Sizes) -> int:
    return request.batches[0] if request.batches else min(sizes.run.train.batch_size, 64)


def _one_step(request: BenchmarkRequest, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """One training step, or the decoding of one batch."""
    run = sizes.run
    if request.job == "decode":
        lm, task = fresh_lm(sizes, device)
        assert sizes.lm is not None
        config = sizes.lm.eval
        decoder = lm.generator(
            Sampling(steps=config.steps),
            precision=precision_on(device),
            int8_cross_kv=config.int8_cross_kv,
            compile=config.compile,
        )
        batch = request.batches[0] if request.batches else BATCHES[device.type][1]
        return functools.partial(decoder, synthetic_batch(task, run.data.image_size, batch, device)["image"], None)
    batch = _training_batch(request, sizes)
    stage = stage_of(sizes)
    data = synthetic_batch(stage.task, run.data.image_size, batch, device)
    return steps(stepper_of(stage, run, batch), itertools.repeat(data))


def operators(request: BenchmarkRequest, count: int) -> str:
    """The `count` most expensive operators of training or decoding, as a table of torch's profiler."""
    assert request.sizes is not None
    device = processes.device()
    step = _one_step(request, request.sizes, device)
    for _ in range(3):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step()
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=count, max_name_column_width=60)


def run_benchmark(
    request: BenchmarkRequest,
    *,
    json_file: Path | None,
    against: Path | None,
    num_operators: int,
    say: Callable[[str], None],
    peer_file: Path | None = None,
) -> None:
    """Measures, reports the table through `say`, compares it with an earlier run and with the figures of `peer_file`,
    and writes it as JSON.
    """
    if num_operators and request.job not in ("train-oracle", "train-lm", "decode"):
        raise UserError("--operators works only with train-oracle, train-lm and decode")
    earlier = read_earlier(against) if against else None
    peer = read_peer(peer_file) if peer_file else None
    lines, peak = measure(request, say)
    say(markdown(lines, earlier, peer))
    if peer is not None and peer_file is not None:
        for text in ([f"{peer.name}: {peer.about}"] if peer.about else []) + unmatched(peer, lines, peer_file):
            say(text)
    if earlier is not None and earlier["device"] != peak.device:
        say(f"note: {against} was measured on another device: {earlier['device']}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(to_json(lines, peak), indent=1) + "\n")
    if num_operators:
        say(operators(request, num_operators))
