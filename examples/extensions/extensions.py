"""An example of a quantizer and of a token model. docs/extending.md explains them.

B batch, L code length, V codes, d channels, D width, S image side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import LMModelConfig, QuantizerConfig
from uvim_fsq.layers import signed_pixels
from uvim_fsq.lm.base import CodeLoss, Generated, TokenModel, register_token_model, total_loss
from uvim_fsq.lm.sampling import GREEDY, Sampling, example_uniforms, sample
from uvim_fsq.oracle.quantizers.base import Quantized, Quantizer, register_quantizer
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.flops import TokenModelCost


class Binary(Quantizer):
    """The signs of d channels: 2^d codes, channel 0 is the lowest bit. A loss pulls z towards its code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.codebook_size = dim, 2**dim
        self.register_buffer("bits", 2 ** torch.arange(dim), persistent=False)

    bits: torch.Tensor

    def forward(self, z: torch.Tensor) -> Quantized:
        z = z.float()
        signs = torch.where(z >= 0, 1.0, -1.0)
        distance = (z - signs).square().mean((1, 2))
        codes = signs + (z - z.detach())
        return Quantized(codes, self.codes_to_indices(signs), 0.1 * distance, {"distance": distance.detach()})

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        return ((indices.unsqueeze(-1) // self.bits) % 2).float() * 2 - 1

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        return ((codes > 0).long() * self.bits).sum(-1)


@register_quantizer("binary")
def build_binary(config: QuantizerConfig) -> Binary:
    """`model.quantizer.codeword_dim` is the number of bits."""
    return Binary(config.codeword_dim)


@dataclass(frozen=True)
class ParallelCost(TokenModelCost):
    """The cost of `forward` FLOP per image, in one step."""

    forward: float

    @property
    def train(self) -> float:
        return 3 * self.forward

    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        return self.forward / 2 * number_bytes

    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        return batch * self.forward / peak.flops


@register_token_model("parallel")
class Parallel(TokenModel):
    """Predicts every position independently, from one vector of the whole image."""

    def __init__(self, config: LMModelConfig, *, image_size: int, vocab_size: int, length: int) -> None:
        super().__init__(config, image_size=image_size, vocab_size=vocab_size, length=length)
        self.stem = nn.Linear(3 * image_size**2, config.width)
        self.head = nn.Linear(config.width, length * vocab_size)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """(B, L, V)."""
        hidden = torch.tanh(self.stem(signed_pixels(image).flatten(1)))
        return self.head(hidden).float().view(-1, self.length, self.vocab_size)

    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, code_loss: CodeLoss | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.logits(image)
        value = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
        return total_loss(value, {"parallel_loss": value.detach()}, code_loss, logits, None)

    def log_prob(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(self.logits(image).transpose(1, 2), tokens, reduction="none")

    def generate(
        self,
        image: torch.Tensor,
        sampling: Sampling = GREEDY,
        seeds: torch.Tensor | None = None,
        *,
        probabilities: bool = False,
    ) -> Generated:
        logits = self.logits(image)
        if sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            uniforms = example_uniforms(torch.arange(len(image)) if seeds is None else seeds, self.length)
            flat = (logits / sampling.temperature).flatten(0, 1)
            tokens = sample(flat, uniforms.view(-1, 1).to(flat.device), sampling.top_k, sampling.top_p).view(
                len(image), self.length
            )
        return Generated(tokens, logits.softmax(-1) if probabilities else None)

    def cost(self, steps: int | None = None) -> ParallelCost:
        return ParallelCost(2.0 * (self.stem.weight.numel() + self.head.weight.numel()))

    def activation_bytes(self, number_bytes: int) -> float:
        return number_bytes * (self.stem.in_features + self.config.width + 3 * self.length * self.vocab_size)
