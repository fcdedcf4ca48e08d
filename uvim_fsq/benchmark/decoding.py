"""Speed of decoding, of its image encoder alone and of tokenization, for several batch sizes, with roofline limits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import nn

from uvim_fsq.benchmark.setup import Sizes, fresh_lm, fresh_oracle, synthetic_batch
from uvim_fsq.inference.ahead_of_time import choose_loop, compile_module
from uvim_fsq.inference.compiled import load_package, package_function
from uvim_fsq.inference.one_graph import needs_loop
from uvim_fsq.lm.base import PureGenerator, TokenModel
from uvim_fsq.lm.encoder_decoder import EncoderDecoder
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.flops import EncoderDecoderCost
from uvim_fsq.performance.timing import Measurement, rate, time_built
from uvim_fsq.tasks.base import Task

#: The numbers of steps that models which decode in steps are timed with.
STEPS = (1, 4, 8)
BYTES = {"fp32": 4, "bf16": 2}

#: "compiled": `torch.compile` of a decoding step. "ahead of time": all of it in one package, as by `uvim-fsq compile`.
Compilation = Literal["", "compiled", "ahead of time"]


def precision_on(device: torch.device) -> str:
    """The precision in which decoding is measured: float32 on a CPU, where bf16 is no faster."""
    return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Variant:
    """A way to decode that is timed: a model, its number of steps, 8-bit keys and values, compilation."""

    lm: TokenModel
    steps: int | None
    int8: bool
    compilation: Compilation


@dataclass(frozen=True)
class Work:
    """What one row times.

    Attributes:
        build: returns the function that is timed.
        seconds: what the device needs at least, at its peak rates; None if that is not known.
        read: bytes that it reads; None where arithmetic is the limit.
    """

    build: Callable[[], Callable[[], object]]
    seconds: float | None
    read: float | None = None


def decoding_variants(sizes: Sizes, device: torch.device) -> tuple[dict[str, Variant], Task]:
    """What is timed for a configuration of stage II, title -> variant, and the task.

    Models with cached decoding are also timed with 8-bit cross-attention keys and values. With `eval.compile`, all are
    also compiled: each step where models are decoded step by step, and the whole ahead of time where it can be. Models
    that decode in steps are timed with several numbers of steps, beside an autoregressive one of equal size.
    """
    assert sizes.lm is not None
    lm, task = fresh_lm(sizes, device)
    models: list[tuple[str, TokenModel, int | None]] = [("", lm, None)]
    if lm.has_steps:
        counts = [count for count in STEPS if count <= lm.length]
        models = [(f", {count} step{'s' * (count > 1)}", lm, count) for count in counts]
        other = replace(sizes.lm, model=replace(sizes.lm.model, kind="autoregressive"))
        models.append((", autoregressive", fresh_lm(Sizes(sizes.oracle, other), device)[0], None))
    variants: dict[str, Variant] = {}
    compilations: tuple[Compilation, ...] = ("", "compiled", "ahead of time") if sizes.lm.eval.compile else ("",)
    for compilation in compilations:
        for title, model, steps in models:
            if compilation == "ahead of time" and not isinstance(model.generator(), PureGenerator):
                continue
            for int8 in (False, True) if model.has_cached_decoding and compilation != "ahead of time" else (False,):
                name = f"{title}{', 8-bit cross-attention K/V' * int8}{f', {compilation}' if compilation else ''}"
                variants[name] = Variant(model, steps, int8, compilation)
    return variants, task


def measure_decoding(
    sizes: Sizes, peak: DevicePeak, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Times greedy generation in all `decoding_variants`, their image encoder, and tokenization by the oracle."""
    assert sizes.lm is not None
    variants, task = decoding_variants(sizes, device)
    precision, lines = precision_on(device), []
    name = sizes.oracle.task.name
    oracle = fresh_oracle(sizes)[0].to(device)
    for batch in batches:
        data = synthetic_batch(task, sizes.lm.data.image_size, batch, device)
        at = f"{name}, {precision}, batch {batch}"
        works = {f"decode {at}{title}": _decoding(variant, data["image"], peak) for title, variant in variants.items()}
        lm = next(iter(variants.values())).lm
        if isinstance(lm, EncoderDecoder):
            works[f"image encoder {at}"] = _encoding(lm, data["image"], peak, ahead=False)
            if sizes.lm.eval.compile:
                works[f"image encoder {at}, ahead of time"] = _encoding(lm, data["image"], peak, ahead=True)
        # In float32 on every device, while a GPU's peak rate is that of bf16.
        seconds = None if device.type == "cuda" else batch * oracle.cost().tokenize / peak.flops
        tokenize = functools.partial(oracle.tokenize, data["labels"], data["image"])
        works[f"tokenize {name}, fp32, batch {batch}"] = Work(lambda work=tokenize: work, seconds)
        lines += _time(works, device, peak, batch, repeats)
    return lines


def _time(
    works: Mapping[str, Work], device: torch.device, peak: DevicePeak, batch: int, repeats: int
) -> list[Measurement]:
    timings = time_built({name: work.build for name, work in works.items()}, device, repeats=repeats)
    lines = []
    for name, work in works.items():
        timing = timings[name]
        # Relative to the whole time, image encoder included.
        share = {} if work.read is None else {"fraction of bandwidth": work.read / timing.median / peak.bandwidth}
        limit = None if work.seconds is None else batch / work.seconds
        lines.append(rate(name, timing, batch, roofline=limit, other=share))
    return lines


def _decoding(variant: Variant, images: torch.Tensor, peak: DevicePeak) -> Work:
    precision, batch = precision_on(images.device), len(images)
    size = BYTES[precision]
    cost = variant.lm.cost(variant.steps)
    bytes_of = {"number_bytes": size, "cross_bytes": 1 if variant.int8 else size}

    def build() -> Callable[[], object]:
        generator = variant.lm.generator(
            Sampling(steps=variant.steps),
            precision=precision,
            int8_cross_kv=variant.int8,
            compile=variant.compilation == "compiled",
        )
        if variant.compilation != "ahead of time":
            return functools.partial(generator, images, None)
        assert isinstance(generator, PureGenerator)
        choose_loop(generator)
        return _package(_Tokens(variant.lm, generator), images, has_loop=needs_loop(generator))

    return Work(build, cost.generate_seconds(batch, peak, **bytes_of), cost.generate_bytes(batch, **bytes_of))


def _encoding(lm: EncoderDecoder, images: torch.Tensor, peak: DevicePeak, *, ahead: bool) -> Work:
    encoder = _Encoder(lm.encoder, precision_on(images.device))
    cost = lm.cost()
    assert isinstance(cost, EncoderDecoderCost)

    def build() -> Callable[[], object]:
        return _package(encoder, images) if ahead else functools.partial(_without_gradient, encoder, images)

    return Work(build, len(images) * cost.image_encoder.forward / peak.flops)


class _Tokens(nn.Module):
    """Images to tokens, without random numbers."""

    def __init__(self, lm: TokenModel, generator: PureGenerator) -> None:
        super().__init__()
        self.lm, self.generator = lm, generator

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.generator.predict(images, None).tokens


class _Encoder(nn.Module):
    """Images to the image tokens that a token model attends to."""

    def __init__(self, encoder: nn.Module, precision: str) -> None:
        super().__init__()
        self.encoder, self.bf16 = encoder, precision == "bf16"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.encoder(images)


@torch.inference_mode()
def _without_gradient(module: nn.Module, images: torch.Tensor) -> object:
    return module(images)


def _package(module: nn.Module, images: torch.Tensor, *, has_loop: bool = False) -> Callable[[], object]:
    """A module's package, used as by `CompiledPrediction`."""
    with TemporaryDirectory(prefix="uvim-fsq-") as place:
        runner = load_package(compile_module(module.eval(), (images,), Path(place) / "made.pt2"), images.device)
    return functools.partial(package_function(runner, [images], has_loop=has_loop), [images])
