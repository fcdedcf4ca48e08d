"""Decoding speed of the LM, image encoder included, for several batch sizes, with its roofline limit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from uvim_fsq.benchmark.setup import Sizes, fresh_lm, synthetic_batch
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, rate, time_built

BYTES = {"fp32": 4, "bf16": 2}


def precision_on(device: torch.device) -> str:
    """The precision in which decoding is measured: float32 on a CPU, where bf16 is no faster."""
    return "bf16" if device.type == "cuda" else "fp32"


def measure_decoding(
    sizes: Sizes, peak: DevicePeak, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Times greedy generation. Models with cached decoding are also timed with 8-bit cross-attention keys and values,
    and with `eval.compile` also compiled.
    """
    assert sizes.lm is not None
    lm, task = fresh_lm(sizes, device)
    cost, precision = lm.cost(), precision_on(device)
    size, lines = BYTES[precision], []
    int8_options = (False, True) if lm.has_cached_decoding else (False,)
    compile_options = (False, True) if sizes.lm.eval.compile else (False,)
    variants = {
        f"{', 8-bit cross-attention K/V' * i}{', compiled' * c}": (i, c) for c in compile_options for i in int8_options
    }

    def build(images: torch.Tensor, int8: bool, compiled: bool) -> Callable[[], object]:
        return functools.partial(lm.generator(precision=precision, int8_cross_kv=int8, compile=compiled), images, None)

    for batch in batches:
        images = synthetic_batch(task, sizes.lm.data.image_size, batch, device)["image"]
        builders = {title: functools.partial(build, images, *options) for title, options in variants.items()}
        for title, timing in time_built(builders, device, repeats=repeats).items():
            bytes_of = {"number_bytes": size, "cross_bytes": 1 if variants[title][0] else size}
            limit = cost.generate_seconds(batch, peak, **bytes_of)
            read = cost.generate_bytes(batch, **bytes_of)
            # Relative to the whole time, image encoder included.
            share = {"fraction of bandwidth": read / timing.median / peak.bandwidth}
            name = f"decode {sizes.oracle.task.name}, {precision}, batch {batch}{title}"
            lines.append(rate(name, timing, batch, roofline=batch / limit, other=share))
    return lines
