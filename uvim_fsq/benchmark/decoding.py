"""How fast the LM decodes, image encoder included: batch by batch, beside the floor of what a step has to read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from uvim_fsq.benchmark.setup import Sizes, fresh_lm, made_up_batch
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, rate, time_made

BYTES = {"fp32": 4, "bf16": 2}


def precision_on(device: torch.device) -> str:
    """In which decoding is measured: bf16 is no gain on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"


def measure_decoding(
    sizes: Sizes, peak: DevicePeak, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Greedy generation; where the model has them also with 8-bit cross-attention, and with `eval.compile` compiled."""
    assert sizes.lm is not None
    lm, task = fresh_lm(sizes, device)
    cost, precision = lm.cost(), precision_on(device)
    size, lines = BYTES[precision], []
    int8_options = (False, True) if lm.has_cached_decoding else (False,)
    compile_options = (False, True) if sizes.lm.eval.compile else (False,)
    kinds = {f"{', 8-bit memory' * i}{', compiled' * c}": (i, c) for c in compile_options for i in int8_options}

    def decoding(images: torch.Tensor, int8: bool, compiled: bool) -> Callable[[], object]:
        return functools.partial(lm.generator(precision=precision, int8_cross_kv=int8, compile=compiled), images, None)

    for batch in batches:
        images = made_up_batch(task, sizes.lm.data.image_size, batch, device)["image"]
        ways = {title: functools.partial(decoding, images, *kind) for title, kind in kinds.items()}
        for title, timing in time_made(ways, device, repeats=repeats).items():
            bytes_of = {"number_bytes": size, "cross_bytes": 1 if kinds[title][0] else size}
            least = cost.generate_seconds(batch, peak, **bytes_of)
            read = cost.generate_bytes(batch, **bytes_of)
            # Of all the time, the encoder's included.
            share = {"bandwidth share": read / timing.median / peak.bandwidth}
            name = f"decode {sizes.oracle.task.name}, {precision}, batch {batch}{title}"
            lines.append(rate(name, timing, batch, floor=batch / least, further=share))
    return lines
