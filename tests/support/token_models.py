"""A small autoregressive LM, its images, and generation without a cache as the specification."""

from __future__ import annotations

import torch

from uvim_fsq.config.schema import EncoderConfig, LMModelConfig
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.sampling import example_uniforms, sample

ENCODER = EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
CONFIG = LMModelConfig(encoder=ENCODER, width=24, depth=2, num_heads=2, mlp_dim=32)


def make_lm(length: int = 9) -> AutoregressiveLM:
    """An LM for 32 x 32 images and 11 tokens, with a head that is not zero."""
    torch.manual_seed(0)
    lm = AutoregressiveLM(CONFIG, image_size=32, vocab_size=11, length=length).eval()
    torch.nn.init.normal_(lm.head.weight)
    return lm


def make_images(count: int = 5) -> torch.Tensor:
    """(count, 3, 32, 32) uint8."""
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@torch.no_grad()
def generate_without_cache(
    lm: AutoregressiveLM, image: torch.Tensor, temperature: float, seeds: torch.Tensor, **filters: float
) -> torch.Tensor:
    """Repeats the whole teacher-forced pass for every token."""
    memory = lm.encode(image)
    uniforms = example_uniforms(seeds, lm.length)
    tokens = torch.zeros(len(image), lm.length, dtype=torch.long)
    for i in range(lm.length):
        logits = lm.decode(tokens, memory)[:, i]
        if temperature == 0:
            tokens[:, i] = logits.argmax(-1)
        else:
            top_k, top_p = filters.get("top_k"), filters.get("top_p")
            k = int(top_k) if top_k is not None else None
            tokens[:, i] = sample(logits / temperature, uniforms[:, i : i + 1], k, top_p)[:, 0]
    return tokens
