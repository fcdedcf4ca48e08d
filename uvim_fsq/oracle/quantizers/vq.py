"""Vector quantization as in UViM (arXiv 2205.10337, appendix A): the baseline that FSQ replaces.

B batch, d channels, K codewords. All computation is in float32, even inside autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from uvim_fsq.config.schema import QuantizerConfig
from uvim_fsq.oracle.quantizers.base import Quantized, Quantizer, register_quantizer

#: Added to the variance when standardizing.
EPS = 1e-5
#: Codebook splitting revives codewords whose running count falls below this.
RARE = 0.1
#: Running counts stop decaying at this value, so that an unused codeword keeps its direction if it is never revived.
MIN_COUNT = 1e-12


class VQ(Quantizer):
    """Assigns each vector to the nearest of K unit-length codewords, which are learned as running sums.

    The codebook has no gradient. It changes only in `on_optimizer_step`, from the statistics that `accumulate` has
    collected since the previous step.

    Args:
        codebook_size: K.
        dim: d.
        momentum: decay of the running counts and sums.
        split: codebook splitting, in which the most frequent codeword gives half of its count to the rarest.
        commitment: weight of the auxiliary loss, the mean squared distance between the standardized z and its
            codeword; 0 disables it.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        momentum: float = 0.995,
        split: bool = True,
        commitment: float = 0.0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.momentum, self.split = codebook_size, dim, momentum, split
        self.commitment = commitment
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", torch.randn(codebook_size, dim) * codebook_size**-0.5)
        # Not buffers: DistributedDataParallel would overwrite them with those of the first process.
        self._accumulated: tuple[torch.Tensor, torch.Tensor] | None = None

    counts: torch.Tensor
    sums: torch.Tensor

    def codebook(self) -> torch.Tensor:
        """All codewords, of unit length: (K, d) float32."""
        # The counts cancel, because sum / count has the same direction as the sum.
        largest = self.sums.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return F.normalize(self.sums / largest, dim=1)

    @staticmethod
    def standardize(z: torch.Tensor) -> torch.Tensor:
        """(..., d) -> float32 with mean 0 and variance 1 over the channels."""
        # Autocast runs layer_norm in float32.
        return F.layer_norm(z.float(), (z.shape[-1],), eps=EPS)

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantizes (..., d) reals to codewords (..., d) float32 and indices (...) int64.

        The straight-through gradient goes to the standardized z.
        """
        with torch.autocast(z.device.type, enabled=False):
            raw, z = z, self.standardize(z)
            words = self.codebook()
            # The nearest of several unit vectors has the largest dot product.
            indices = (z @ words.T).argmax(-1)
            codes = F.embedding(indices, words) + (z - z.detach())
            if not self.commitment:
                return Quantized(codes, indices)
            # Standardized again, so that the gradients of the two losses are added at the bottleneck itself.
            distance = (self.standardize(raw) - codes.detach()).square().mean((1, 2))
            return Quantized(codes, indices, self.commitment * distance, {"commitment": distance.detach()})

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) float32 codewords."""
        return F.embedding(indices, self.codebook())

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d) codewords -> (...) int64 in [0, K)."""
        return (codes.float() @ self.codebook().T).argmax(-1)

    @torch.no_grad()
    def accumulate(self, z: torch.Tensor, indices: torch.Tensor) -> None:
        """Adds the counts and sums of one micro batch: `z` (..., d), the input of `forward`, and its indices (...)."""
        flat, rows = self.standardize(z).reshape(-1, self.dim), indices.reshape(-1)
        counts = torch.zeros_like(self.counts).index_add_(0, rows, flat.new_ones(len(rows)))
        sums = torch.zeros_like(self.sums).index_add_(0, rows, flat)
        if self._accumulated is not None:
            counts, sums = counts + self._accumulated[0], sums + self._accumulated[1]
        self._accumulated = counts, sums

    def on_optimizer_step(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        self.ema_update(reduce, seed)

    @torch.no_grad()
    def ema_update(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """Updates the running counts and sums with everything accumulated since the last call.

        Args:
            reduce: sums a tensor over all processes.
            seed: for the noise of codebook splitting; the same in all processes.
        """
        if self._accumulated is None:
            return
        counts, sums = (reduce(x) for x in self._accumulated)
        self._accumulated = None
        decay = torch.where(self.counts > MIN_COUNT, self.momentum, 1.0)
        self.counts.mul_(decay).add_(counts)
        self.sums.mul_(decay.unsqueeze(1)).add_(sums)
        if self.split and bool(self.counts.min() < RARE):
            self._split(torch.Generator().manual_seed(seed))

    def _split(self, generator: torch.Generator) -> None:
        counts, sums = self.counts.to("cpu", copy=True), self.sums.to("cpu", copy=True)
        rarest = int(counts.argmin())
        while counts[rarest] < RARE:
            most = int(counts.argmax())
            if counts[most] < 2 * RARE:
                break  # too few tokens for this many codewords: both halves would be rare again, in an endless loop
            noise = torch.rand(self.dim, generator=generator) * 0.002 + 0.999
            counts[most] /= 2
            sums[most] /= 2
            counts[rarest], sums[rarest] = counts[most], sums[most] * noise
            rarest = int(counts.argmin())
        self.counts.copy_(counts)
        self.sums.copy_(sums)

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, dim={self.dim}, momentum={self.momentum}, split={self.split}"


@register_quantizer("vq")
def build_vq(config: QuantizerConfig) -> VQ:
    """Builds VQ from the settings of `model.quantizer`."""
    return VQ(
        config.codebook_size,
        config.codeword_dim,
        momentum=config.momentum,
        split=config.split,
        commitment=config.commitment,
    )
