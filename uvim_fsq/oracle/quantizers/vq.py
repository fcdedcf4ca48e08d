"""Vector quantization as UViM has it (arXiv 2205.10337, appendix A): the baseline that FSQ replaces.

B, N any leading sizes; d channels; K codewords. All arithmetic is float32, also inside autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from uvim_fsq.config.schema import QuantizerConfig
from uvim_fsq.oracle.quantizers.base import Quantized, Quantizer, register_quantizer

#: Inside the root of the standardisation.
EPS = 1e-5
#: Codebook splitting revives codewords whose running count falls below this.
RARE = 0.1
#: Unused codewords fade no further than this, so that they keep a direction where nothing revives them.
FADED = 1e-12


class VQ(Quantizer):
    """Chooses the nearest of K unit codewords, learned as running sums of the vectors assigned to them.

    The codebook has no gradient. It changes only in `on_optimizer_step`, from what `accumulate` has gathered since the
    last one.

    Args:
        codebook_size: K.
        dim: d.
        momentum: of the running counts and sums.
        split: codebook splitting: the most frequent codeword is halved in favour of the rarest.
        commitment: weight of the mean squared distance between the standardized z and its codeword, as the auxiliary
            loss; 0 leaves it out.
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
        # No buffers: DistributedDataParallel would overwrite them by those of the first process.
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    counts: torch.Tensor
    sums: torch.Tensor

    def codebook(self) -> torch.Tensor:
        """(K, d) float32 of length 1."""
        # The counts drop out: sum / count has the direction of the sum.
        largest = self.sums.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return F.normalize(self.sums / largest, dim=1)

    @staticmethod
    def standardize(z: torch.Tensor) -> torch.Tensor:
        """(..., d) -> mean 0 and variance 1 over the channels, float32."""
        # Autocast leaves this one in float32.
        return F.layer_norm(z.float(), (z.shape[-1],), eps=EPS)

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantizes (..., d) reals to codewords (..., d) float32 and indices (...) int64.

        The gradient passes straight through to the standardised z.
        """
        with torch.autocast(z.device.type, enabled=False):
            raw, z = z, self.standardize(z)
            words = self.codebook()
            # Of unit vectors the nearest has the largest product.
            indices = (z @ words.T).argmax(-1)
            codes = F.embedding(indices, words) + (z - z.detach())
            if not self.commitment:
                return Quantized(codes, indices)
            # Standardized again: the two losses' gradients then add up at the bottleneck itself.
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
        """Gathers one micro batch: `z` (..., d) as it came to `forward`, and the indices (...) it gave."""
        flat, rows = self.standardize(z).reshape(-1, self.dim), indices.reshape(-1)
        counts = torch.zeros_like(self.counts).index_add_(0, rows, flat.new_ones(len(rows)))
        sums = torch.zeros_like(self.sums).index_add_(0, rows, flat)
        if self._seen is not None:
            counts, sums = counts + self._seen[0], sums + self._seen[1]
        self._seen = counts, sums

    def on_optimizer_step(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """`ema_update`."""
        self.ema_update(reduce, seed)

    @torch.no_grad()
    def ema_update(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """Moves the codebook's running means by everything accumulated since the last call.

        Args:
            reduce: sums a tensor over all processes.
            seed: of the noise in splitting; the same in all processes.
        """
        if self._seen is None:
            return
        counts, sums = (reduce(x) for x in self._seen)
        self._seen = None
        fade = torch.where(self.counts > FADED, self.momentum, 1.0)
        self.counts.mul_(fade).add_(counts)
        self.sums.mul_(fade.unsqueeze(1)).add_(sums)
        if self.split and bool(self.counts.min() < RARE):
            self._split(torch.Generator().manual_seed(seed))

    def _split(self, generator: torch.Generator) -> None:
        counts, sums = self.counts.to("cpu", copy=True), self.sums.to("cpu", copy=True)
        rarest = int(counts.argmin())
        while counts[rarest] < RARE:
            most = int(counts.argmax())
            if counts[most] < 2 * RARE:
                break  # too few tokens for so many codewords: halves would be rare again, without end
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
    """VQ with the codebook of `model.quantizer`."""
    return VQ(
        config.codebook_size,
        config.codeword_dim,
        momentum=config.momentum,
        split=config.split,
        commitment=config.commitment,
    )
