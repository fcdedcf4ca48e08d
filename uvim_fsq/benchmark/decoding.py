"""How fast the LM decodes, image encoder included: batch by batch, beside the floor of what a step has to read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from uvim_fsq.benchmark.ceilings import Ceilings
from uvim_fsq.benchmark.floors import decode_seconds, lm_cost, step_bytes
from uvim_fsq.benchmark.measure import Measurement, rate, time_made
from uvim_fsq.benchmark.setup import Sizes, fresh_lm, made_up_batch
from uvim_fsq.lm.generate import Decoder

BYTES = {"fp32": 4, "bf16": 2}


def precision_on(device: torch.device) -> str:
    """In which decoding is measured: bf16 is no gain on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"


def measure_decoding(
    sizes: Sizes, ceilings: Ceilings, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Greedy decoding with full and with 8-bit cross-attention memory; with `eval.compile` also compiled."""
    assert sizes.lm is not None
    lm, task = fresh_lm(sizes, device)
    cost, precision = lm_cost(lm), precision_on(device)
    size, lines = BYTES[precision], []
    compiles = (False, True) if sizes.lm.eval.compile else (False,)
    kinds = {f"{', 8-bit memory' * i}{', compiled' * c}": (i, c) for c in compiles for i in (False, True)}

    def decoding(images: torch.Tensor, int8: bool, compiled: bool) -> Callable[[], torch.Tensor]:
        return functools.partial(Decoder(lm, precision=precision, int8=int8, compile=compiled), images)

    for batch in batches:
        images = made_up_batch(task, sizes.lm.data.image_size, batch, device)["image"]
        ways = {title: functools.partial(decoding, images, *kind) for title, kind in kinds.items()}
        for title, timing in time_made(ways, device, repeats=repeats).items():
            bytes_of = {"number_bytes": size, "cross_bytes": 1 if kinds[title][0] else size}
            least = decode_seconds(cost, batch, ceilings, **bytes_of)
            read = sum(step_bytes(cost, batch, past, **bytes_of) for past in range(1, cost.length + 1))
            # Of all the time, the encoder's included.
            share = {"bandwidth share": read / timing.median / ceilings.bandwidth}
            name = f"decode {sizes.oracle.task.name}, {precision}, batch {batch}{title}"
            lines.append(rate(name, timing, batch, floor=batch / least, further=share))
    return lines
