"""A masked token model (MaskGIT, arXiv 2202.04200), which predicts several tokens of an image at once.

B batch, S image side, M memory tokens (patches), E encoder width, L code length, V vocabulary, D decoder width,
H heads, hd head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import LMModelConfig
from uvim_fsq.lm.base import CodeLoss, Generated, Generator, register_token_model, total_loss
from uvim_fsq.lm.decoder_block import DecoderBlock
from uvim_fsq.lm.encoder_decoder import EncoderDecoder
from uvim_fsq.lm.masked_generator import CrossAttended, MaskedGenerator
from uvim_fsq.lm.masked_schedules import uncovering_groups, unknown_counts
from uvim_fsq.lm.sampling import GREEDY, Sampling
from uvim_fsq.performance.flops import MaskedCost, masked_cost


def random_masks(
    batch: int, length: int, floor: float, all_masked: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which positions to predict in training, (B, L) bool, at least one per example.

    With probability `all_masked` these are all positions. Otherwise a share cos(pi / 2 u) of them is chosen at random,
    where u is uniform between 0 and the value whose share is `floor` (FSQ paper, appendix A.4.2).
    """
    angle = torch.rand(batch, 1, device=device) * math.acos(floor)
    count = (angle.cos() * length).ceil().clamp(1, length)
    count = count.masked_fill(torch.rand(batch, 1, device=device) < all_masked, length)
    rank = torch.rand(batch, length, device=device).argsort(1).argsort(1)
    return rank < count


def _mean_over(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The mean (B,) of x (B, L) over the positions in `mask` (B, L)."""
    return (x * mask).sum(1) / mask.sum(1)


@register_token_model("masked")
class MaskedLM(EncoderDecoder):
    """An encoder-decoder transformer without a causal mask. The learned vector `mask` stands in for unknown tokens."""

    has_steps = True
    mask: nn.Parameter

    def __init__(self, config: LMModelConfig, *, image_size: int, vocab_size: int, length: int) -> None:
        super().__init__(
            config, image_size=image_size, vocab_size=vocab_size, length=length, causal=False, symbol="mask"
        )

    def memory_heads(self, memory: torch.Tensor) -> CrossAttended:
        """The keys and values of every block's cross-attention, which all passes over the tokens share."""
        found: CrossAttended = []
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            found.append(block.memory_heads(memory))
        return found

    def hidden(self, tokens: torch.Tensor, known: torch.Tensor, attended: CrossAttended) -> torch.Tensor:
        """One pass over all positions, up to the head's input.

        Args:
            tokens: (B, L) int64, anything in [0, V) where not known.
            known: (B, L) bool.
            attended: from `memory_heads`.

        Returns (B, L, D).
        """
        embedded = self.token_embedding(tokens)
        x = torch.where(known.unsqueeze(-1), embedded, self.mask.to(embedded.dtype)) + self.positions
        x = self.dropout(x)
        for block, (key, value) in zip(self.blocks, attended, strict=True):
            assert isinstance(block, DecoderBlock)
            x = block.attend(x, key, value)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) from `hidden` -> (..., V) in the dtype of the weights, even inside autocast.

        Confidences are compared with each other, and in bf16 many would be equal.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))

    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, code_loss: CodeLoss | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy, averaged over each example's masked positions; logs the accuracy at them.

        The masks are drawn from torch's default generator. `code_loss` receives the predicted distributions at the
        masked positions, and at the others distributions that are certain of the true token.
        """
        floor, all_masked = self.config.mask_floor, self.config.all_masked
        masked = random_masks(len(tokens), self.length, floor, all_masked, tokens.device)
        memory = self.encode(image)
        logits = self.head(self.hidden(tokens, ~masked, self.memory_heads(memory)))
        logs = {"token_accuracy": _mean_over(masked, (logits.argmax(-1) == tokens).float())}
        loss = _mean_over(masked, self.token_loss(logits, tokens))
        if code_loss is not None:
            certain = torch.full_like(logits, -torch.inf).scatter_(2, tokens.unsqueeze(-1), 0.0)
            logits = torch.where(masked.unsqueeze(-1), logits, certain)
        return total_loss(loss, logs, code_loss, logits, memory)

    def log_prob(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Natural log-probability (B, L) float32 of each given token under M2T's deterministic schedule.

        The schedule (arXiv 2304.07313; the FSQ paper measures the compression cost with it) uncovers the positions in 8
        groups, and each token is predicted from the true tokens of all earlier groups. This is not the order in which
        `generate` chooses tokens: that depends on confidences, and with one step no token depends on any other.
        """
        attended = self.memory_heads(self.encode(image))
        known = torch.zeros_like(tokens, dtype=torch.bool)
        found = torch.zeros(tokens.shape, device=tokens.device)
        for group in uncovering_groups(self.length):
            positions = torch.tensor(group, device=tokens.device)
            logits = self.logits(self.hidden(tokens, known, attended)[:, positions]).float()
            costs = F.cross_entropy(logits.transpose(1, 2), tokens[:, positions], reduction="none")
            found = found.index_copy(1, positions, -costs)
            known = known.index_fill(1, positions, True)
        return found

    def generate(
        self,
        image: torch.Tensor,
        sampling: Sampling = GREEDY,
        seeds: torch.Tensor | None = None,
        *,
        probabilities: bool = False,
    ) -> Generated:
        """Decodes in `sampling.steps` steps, see `MaskedGenerator`."""
        self.check_sampling(sampling)
        return MaskedGenerator(self, sampling, probabilities=probabilities)(image, seeds)

    def generator(
        self,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        int8_cross_kv: bool = False,
        compile: bool = False,
        probabilities: bool = False,
    ) -> Generator:
        """A `MaskedGenerator`. 8-bit keys and values are refused: a step reads them once for all positions."""
        self.check_sampling(sampling)
        if int8_cross_kv:
            raise self.unsupported("int8_cross_kv")
        return MaskedGenerator(self, sampling, precision=precision, compile=compile, probabilities=probabilities)

    def cost(self, steps: int | None = None) -> MaskedCost:
        predicted = unknown_counts(self.length, steps or 1)
        encoder = self.encoder.cost()
        return masked_cost(encoder, self.config, vocab_size=self.vocab_size, length=self.length, predicted=predicted)
