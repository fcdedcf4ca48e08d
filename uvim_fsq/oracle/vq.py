"""Vector quantization as UViM has it (arXiv 2205.10337, appendix A): the baseline that FSQ replaces.

B, N any leading sizes; d channels; K codewords. All arithmetic is float32, also inside autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

#: Inside the root of the standardisation.
EPS = 1e-5
#: Codebook splitting revives codewords whose running count falls below this.
RARE = 0.1
#: Unused codewords fade no further than this, so that they keep a direction where nothing revives them.
FADED = 1e-12


class VQ(nn.Module):
    """Nearest of K unit codewords, learned as running sums of what was assigned to them, without gradients.

    The dictionary changes only in `update`, once per optimizer step, from what `observe` has gathered since.

    Args:
        codebook_size: K.
        dim: d.
        momentum: of the running counts and sums.
        split: codebook splitting: the most frequent codeword is halved in favour of the rarest.
    """

    def __init__(self, codebook_size: int, dim: int, *, momentum: float = 0.995, split: bool = True) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.momentum, self.split = codebook_size, dim, momentum, split
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", torch.randn(codebook_size, dim) * codebook_size**-0.5)
        # No buffers: DistributedDataParallel would overwrite them by those of the first process.
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    counts: torch.Tensor
    sums: torch.Tensor

    def codewords(self) -> torch.Tensor:
        """(K, d) float32 of length 1."""
        # The counts drop out: sum / count has the direction of the sum.
        largest = self.sums.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return F.normalize(self.sums / largest, dim=1)

    @staticmethod
    def standardize(z: torch.Tensor) -> torch.Tensor:
        """(..., d) -> mean 0 and variance 1 over the channels, float32."""
        # Autocast leaves this one in float32.
        return F.layer_norm(z.float(), (z.shape[-1],), eps=EPS)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes (..., d) reals to codewords (..., d) float32 and indices (...) int64.

        The gradient passes straight through to the standardised z.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.standardize(z)
            words = self.codewords()
            # Of unit vectors the nearest has the largest product.
            indices = (z @ words.T).argmax(-1)
            return F.embedding(indices, words) + (z - z.detach()), indices

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) float32 codewords."""
        return F.embedding(indices, self.codewords())

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d) codewords -> (...) int64 in [0, K)."""
        return (codes.float() @ self.codewords().T).argmax(-1)

    @torch.no_grad()
    def observe(self, z: torch.Tensor, indices: torch.Tensor) -> None:
        """Gathers one micro batch: `z` (..., d) as it came to `forward`, and the indices (...) it gave."""
        flat, rows = self.standardize(z).reshape(-1, self.dim), indices.reshape(-1)
        counts = torch.zeros_like(self.counts).index_add_(0, rows, flat.new_ones(len(rows)))
        sums = torch.zeros_like(self.sums).index_add_(0, rows, flat)
        if self._seen is not None:
            counts, sums = counts + self._seen[0], sums + self._seen[1]
        self._seen = counts, sums

    @torch.no_grad()
    def update(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """Moves the dictionary by everything observed since the last call.

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
