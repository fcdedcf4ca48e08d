"""Ours beside what a user would pick instead, in one run: the quantizer, and decoding.

B batch, L code length, N tokens, d channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from uvim_fsq.benchmark.compare import compare, find_package
from uvim_fsq.benchmark.decoding import precision_on
from uvim_fsq.benchmark.hugging_face import hugging_face_twin, hugging_face_ways, parameter_count
from uvim_fsq.benchmark.setup import Sizes, fresh_lm
from uvim_fsq.config.rules import resolve_levels
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.base import Generator
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.performance.timing import Measurement, time_ways

#: Code vectors of a large call: 1024 images of 256 tokens.
MANY = (1024, 256)


def measure_side_by_side(
    sizes: Sizes, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """The quantizer and decoding at the sizes of an LM's configuration, untrained."""
    model, lines = sizes.oracle.model, []
    if model.quantizer.kind == "fsq":
        levels = resolve_levels(model.quantizer.levels)
        for shape in ((32, model.code_length), MANY):
            lines += measure_quantizer(levels, shape, device, repeats)
    lm = fresh_lm(sizes, device)[0]
    # The naive loop and the other library's model are encoder-decoders.
    return lines + (measure_decoding(lm, repeats, batches) if isinstance(lm, AutoregressiveLM) else [])


def quantizer_ways(ours: FSQ, theirs: Any, z: torch.Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    """Quantizing `z` (B, N, d) by each of two, with the gradient for z if asked for."""

    def work(quantizer: Any) -> object:
        if not backward:
            with torch.no_grad():
                return quantizer(z)
        leaf = z.detach().requires_grad_()
        codes = quantizer(leaf)[0]
        return torch.autograd.grad(codes, leaf, torch.ones_like(codes))

    ways = {"ours": functools.partial(work, ours)}
    if theirs is not None:
        ways["vector-quantize-pytorch"] = functools.partial(work, theirs)
    return ways


def measure_quantizer(
    levels: Sequence[int], shape: tuple[int, int], device: torch.device, repeats: int
) -> list[Measurement]:
    """Our FSQ beside vector-quantize-pytorch's, (B, N) = `shape` code vectors; forward, and forward with backward.

    Both count the first channel as the fastest. Where they may differ, ours is set to their offset inside the tanh
    (`shift=centered`, for even levels; it costs the same); theirs widens the bounds by 0.1% and ours narrows them, as
    published, so that some of the values next to a rounding border fall to the other side.
    """
    module, version = find_package("vector_quantize_pytorch")
    ours = FSQ(levels, shift="published" if 2 in levels else "centered").to(device)
    # Theirs refuses 2 levels.
    theirs = module.FSQ(list(levels)).to(device) if module is not None and 2 not in levels else None
    z = 2 * torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(0)).to(device)
    further: dict[str, Any] = {"vector-quantize-pytorch": version, "levels": list(levels)}
    if theirs is not None:
        further["equal indices"] = (ours(z)[1] == theirs(z)[1]).double().mean().item()
    size = " x ".join(str(side) for side in z.shape)
    lines: list[Measurement] = []
    for name, backward in (("forward", False), ("forward and backward", True)):
        timings = time_ways(quantizer_ways(ours, theirs, z, backward), device, warmup=3, repeats=repeats)
        lines += compare(f"quantizer {name}, {size}", timings, ours="ours", **further)
    return lines


def naive_generate(lm: AutoregressiveLM, images: torch.Tensor) -> torch.Tensor:
    """Greedy decoding without a cache: the whole prefix anew for each token. (B, 3, S, S) uint8 -> (B, L) int64."""
    with torch.inference_mode():
        memory = lm.encode(images)
        tokens = torch.zeros(len(images), lm.length, dtype=torch.long, device=images.device)
        for i in range(lm.length):
            tokens[:, i] = lm.decode(tokens[:, : i + 1], memory)[:, -1].float().argmax(-1)
    return tokens


def decode_ways(lm: AutoregressiveLM, images: torch.Tensor, twin: Any = None) -> dict[str, Callable[[], torch.Tensor]]:
    """What stands beside our `generate`, each from `images` (B, 3, S, S) uint8 to (B, L) tokens, greedily.

    The naive loop over our LM and, where transformers is installed, an untrained model of equal size by its `generate`.

    Args:
        twin: of `hugging_face_twin`, where one serves several batches; None makes one.
    """
    ways: dict[str, Callable[[], torch.Tensor]] = {"naive loop": functools.partial(naive_generate, lm, images)}
    if find_package("transformers")[0] is not None:
        ways |= hugging_face_ways(lm, images, twin)
    return ways


def _tokens(generator: Generator, images: torch.Tensor) -> torch.Tensor:
    return generator(images, None).tokens


def measure_decoding(lm: AutoregressiveLM, repeats: int, batches: Sequence[int]) -> list[Measurement]:
    """Images per second of our `generate` beside `decode_ways`, on the LM's device and in its number type."""
    module, version = find_package("transformers")
    device = lm.head.weight.device
    precision = precision_on(device)
    decoders = {"ours": lm.generator(precision=precision)}
    if device.type == "cuda":
        # The others have all of their numbers in bf16.
        decoders["ours, compiled"] = lm.generator(precision=precision, compile=True)
        lm = lm.to(torch.bfloat16)
    further: dict[str, Any] = {"transformers": version, "parameters": parameter_count(lm)}
    twin = None
    if module is not None:
        twin = hugging_face_twin(lm)
        further["Hugging Face's parameters"] = parameter_count(twin)
    (side, _) = lm.encoder.patch_embed.img_size or (0, 0)
    lines: list[Measurement] = []
    for batch in batches:
        images = torch.randint(0, 256, (batch, 3, side, side), generator=torch.Generator().manual_seed(0))
        images = images.to(torch.uint8).to(device)
        ours = {name: functools.partial(_tokens, decoder, images) for name, decoder in decoders.items()}
        ways = {**ours, **decode_ways(lm, images, twin)}
        further["naive loop's tokens equal"] = (ways["ours"]() == ways["naive loop"]()).double().mean().item()
        timings = time_ways(ways, device, warmup=2, repeats=repeats)
        lines += compare(f"decoding, batch {batch}", timings, ours="ours", count=batch, unit="images/s", **further)
    return lines
