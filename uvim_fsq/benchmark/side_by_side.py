"""Our quantizer and decoding compared with other libraries in one run.

B batch, L code length, N tokens, d channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from uvim_fsq.benchmark.compare import compare, find_package
from uvim_fsq.benchmark.decoding import precision_on
from uvim_fsq.benchmark.hugging_face import hugging_face_decoders, hugging_face_model, parameter_count
from uvim_fsq.benchmark.setup import Sizes, fresh_lm
from uvim_fsq.config.rules import resolve_levels
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.base import Generator
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.performance.timing import Measurement, time_interleaved

#: (B, N) of a large call: 1024 images of 256 tokens.
LARGE_CALL = (1024, 256)


def measure_side_by_side(
    sizes: Sizes, device: torch.device, *, batches: Sequence[int], repeats: int
) -> list[Measurement]:
    """Compares the quantizer and decoding of untrained models with the sizes of an LM configuration."""
    model, lines = sizes.oracle.model, []
    if model.quantizer.kind == "fsq":
        levels = resolve_levels(model.quantizer.levels)
        for shape in ((32, model.code_length), LARGE_CALL):
            lines += compare_quantizers(levels, shape, device, repeats)
    lm = fresh_lm(sizes, device)[0]
    # The naive loop and the Hugging Face model are encoder-decoders.
    return lines + (compare_decoding(lm, repeats, batches) if isinstance(lm, AutoregressiveLM) else [])


def quantizer_variants(ours: FSQ, theirs: Any, z: torch.Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    """Quantization of `z` (B, N, d) by each of the two, with `backward` also its gradient for z.

    Args:
        theirs: FSQ of vector-quantize-pytorch, or None if it is not installed.
    """

    def work(quantizer: Any) -> object:
        if not backward:
            with torch.no_grad():
                return quantizer(z)
        leaf = z.detach().requires_grad_()
        codes = quantizer(leaf)[0]
        return torch.autograd.grad(codes, leaf, torch.ones_like(codes))

    variants = {"ours": functools.partial(work, ours)}
    if theirs is not None:
        variants["vector-quantize-pytorch"] = functools.partial(work, theirs)
    return variants


def compare_quantizers(
    levels: Sequence[int], shape: tuple[int, int], device: torch.device, repeats: int
) -> list[Measurement]:
    """Times our FSQ and vector-quantize-pytorch's on (B, N) = `shape` code vectors, without and with backward pass.

    In both, the first channel varies fastest in the index. For even levels, ours gets the same offset inside the tanh
    as theirs (`shift=centered`, at equal cost). Indices still differ for a few values close to a rounding boundary,
    because theirs widens the bounds by 0.1% and ours narrows them, as published.
    """
    module, version = find_package("vector_quantize_pytorch")
    ours = FSQ(levels, shift="published" if 2 in levels else "centered").to(device)
    # Theirs does not accept 2 levels.
    theirs = module.FSQ(list(levels)).to(device) if module is not None and 2 not in levels else None
    z = 2 * torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(0)).to(device)
    other: dict[str, Any] = {"vector-quantize-pytorch": version, "levels": list(levels)}
    if theirs is not None:
        other["fraction of equal indices"] = (ours(z)[1] == theirs(z)[1]).double().mean().item()
    size = " x ".join(str(side) for side in z.shape)
    lines: list[Measurement] = []
    for name, backward in (("forward", False), ("forward and backward", True)):
        timings = time_interleaved(quantizer_variants(ours, theirs, z, backward), device, warmup=3, repeats=repeats)
        lines += compare(f"quantizer {name}, {size}", timings, ours="ours", **other)
    return lines


def naive_generate(lm: AutoregressiveLM, images: torch.Tensor) -> torch.Tensor:
    """Greedy decoding without a cache: each step decodes the whole prefix. (B, 3, S, S) uint8 -> (B, L) int64."""
    with torch.inference_mode():
        memory = lm.encode(images)
        tokens = torch.zeros(len(images), lm.length, dtype=torch.long, device=images.device)
        for i in range(lm.length):
            tokens[:, i] = lm.decode(tokens[:, : i + 1], memory)[:, -1].float().argmax(-1)
    return tokens


def alternative_decoders(
    lm: AutoregressiveLM, images: torch.Tensor, model: Any = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Greedy decoders to compare with our `generate`: `images` (B, 3, S, S) uint8 -> (B, L) int64.

    They are the naive loop over our LM and, if transformers is installed and the image encoder is a plain ViT,
    `generate` of an untrained model of equal size.

    Args:
        model: result of `hugging_face_model`, to share it between batch sizes; None builds one.
    """
    decoders: dict[str, Callable[[], torch.Tensor]] = {"naive loop": functools.partial(naive_generate, lm, images)}
    if find_package("transformers")[0] is not None and lm.encoder.vit_size() is not None:
        decoders |= hugging_face_decoders(lm, images, model)
    return decoders


def _tokens(generator: Generator, images: torch.Tensor) -> torch.Tensor:
    return generator(images, None).tokens


def compare_decoding(lm: AutoregressiveLM, repeats: int, batches: Sequence[int]) -> list[Measurement]:
    """Images/s of our `generate` and of `alternative_decoders`, on the LM's device."""
    module, version = find_package("transformers")
    device = lm.head.weight.device
    precision = precision_on(device)
    generators = {"ours": lm.generator(precision=precision)}
    if device.type == "cuda":
        # The others run entirely in bf16.
        generators["ours, compiled"] = lm.generator(precision=precision, compile=True)
        lm = lm.to(torch.bfloat16)
    other: dict[str, Any] = {"transformers": version, "parameters": parameter_count(lm)}
    model = None
    if module is not None and lm.encoder.vit_size() is not None:
        model = hugging_face_model(lm)
        other["Hugging Face parameters"] = parameter_count(model)
    lines: list[Measurement] = []
    for batch in batches:
        images = torch.randint(
            0, 256, (batch, 3, lm.image_size, lm.image_size), generator=torch.Generator().manual_seed(0)
        )
        images = images.to(torch.uint8).to(device)
        ours = {name: functools.partial(_tokens, generator, images) for name, generator in generators.items()}
        decoders = {**ours, **alternative_decoders(lm, images, model)}
        other["tokens equal to naive loop"] = (decoders["ours"]() == decoders["naive loop"]()).double().mean().item()
        timings = time_interleaved(decoders, device, warmup=2, repeats=repeats)
        lines += compare(f"decoding, batch {batch}", timings, ours="ours", count=batch, unit="images/s", **other)
    return lines
