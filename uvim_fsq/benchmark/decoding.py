"""Decoding speed of token models, image encoder included, for several batch sizes, with its roofline limit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from uvim_fsq.benchmark.setup import Sizes, fresh_lm, synthetic_batch
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, rate, time_built
from uvim_fsq.tasks.base import Task

#: The numbers of steps that models which decode in steps are timed with.
STEPS = (1, 4, 8)
BYTES = {"fp32": 4, "bf16": 2}


def precision_on(device: torch.device) -> str:
    """The precision in which decoding is measured: float32 on a CPU, where bf16 is no faster."""
    return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Variant:
    """A way to decode that is timed: a model, its number of steps, 8-bit keys and values, compilation."""

    lm: TokenModel
    steps: int | None
    int8: bool
    compiled: bool


def decoding_variants(sizes: Sizes, device: torch.device) -> tuple[dict[str, Variant], Task]:
    """What is timed for a configuration of stage II, title -> variant, and the task.

    Models with cached decoding are also timed with 8-bit cross-attention keys and values, and with `eval.compile` also
    compiled. Models that decode in steps are timed with several numbers of steps, beside an autoregressive one of equal
    size.
    """
    assert sizes.lm is not None
    lm, task = fresh_lm(sizes, device)
    models: list[tuple[str, TokenModel, int | None]] = [("", lm, None)]
    if lm.has_steps:
        counts = [count for count in STEPS if count <= lm.length]
        models = [(f", {count} step{'s' * (count > 1)}", lm, count) for count in counts]
        other = replace(sizes.lm, model=replace(sizes.lm.model, kind="autoregressive"))
        models.append((", autoregressive", fresh_lm(Sizes(sizes.oracle, other), device)[0], None))
    return {
        f"{title}{', 8-bit cross-attention K/V' * int8}{', compiled' * compiled}": Variant(lm, steps, int8, compiled)
        for compiled in ((False, True) if sizes.lm.eval.compile else (False,))
        for title, lm, steps in models
        for int8 in ((False, True) if lm.has_cached_decoding else (False,))
    }, task


def measure_decoding(
    sizes: Sizes, peak: DevicePeak, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Times greedy generation in all `decoding_variants`."""
    assert sizes.lm is not None
    variants, task = decoding_variants(sizes, device)
    precision = precision_on(device)
    size, lines = BYTES[precision], []

    def build(images: torch.Tensor, variant: Variant) -> Callable[[], object]:
        sampling = Sampling(steps=variant.steps)
        generator = variant.lm.generator(
            sampling, precision=precision, int8_cross_kv=variant.int8, compile=variant.compiled
        )
        return functools.partial(generator, images, None)

    for batch in batches:
        images = synthetic_batch(task, sizes.lm.data.image_size, batch, device)["image"]
        builders = {title: functools.partial(build, images, variant) for title, variant in variants.items()}
        for title, timing in time_built(builders, device, repeats=repeats).items():
            variant = variants[title]
            cost = variant.lm.cost(variant.steps)
            bytes_of = {"number_bytes": size, "cross_bytes": 1 if variant.int8 else size}
            limit = cost.generate_seconds(batch, peak, **bytes_of)
            read = cost.generate_bytes(batch, **bytes_of)
            # Relative to the whole time, image encoder included.
            share = {"fraction of bandwidth": read / timing.median / peak.bandwidth}
            name = f"decode {sizes.oracle.task.name}, {precision}, batch {batch}{title}"
            lines.append(rate(name, timing, batch, roofline=batch / limit, other=share))
    return lines
