"""Statistics of the codes that a quantizer uses: usage, perplexity and level histograms.

The state consists of counts, so it can be summed over processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from uvim_fsq.oracle.quantizers.base import Quantizer


class CodeStatistics:
    """Counts code indices. Usage is the fraction of codes used at least once (FSQ paper, Table 2)."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.counts = np.zeros(quantizer.codebook_size, np.int64)

    def update(self, tokens: torch.Tensor) -> None:
        """Adds (...) int64 indices."""
        flat = tokens.reshape(-1).cpu().numpy()
        self.counts += np.bincount(flat, minlength=self.quantizer.codebook_size)

    def state(self) -> dict[str, np.ndarray]:
        """The counts as `code_counts`, (codebook_size,) float64, to be summed over processes."""
        return {"code_counts": self.counts.astype(np.float64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the counts by those of a (summed) state."""
        self.counts = state["code_counts"].astype(np.int64)

    def level_histogram(self) -> list[list[int]]:
        """How often each level occurred, per channel: d lists of L_i counts; empty for quantizers without levels."""
        if not self.quantizer.levels:
            return []
        codes = torch.arange(self.quantizer.codebook_size, device=self.quantizer.device)
        digits = self.quantizer.indices_to_digits(codes).cpu().numpy()
        return [
            np.bincount(digits[:, i], weights=self.counts, minlength=level).astype(int).tolist()
            for i, level in enumerate(self.quantizer.levels)
        ]

    def compute(self) -> dict[str, float]:
        """`codebook_usage` in [0, 1], `code_perplexity` in [1, codebook_size] and `tokens_counted`."""
        total = int(self.counts.sum())
        p = self.counts[self.counts > 0] / max(total, 1)
        return {
            "codebook_usage": float((self.counts > 0).mean()),
            "code_perplexity": float(np.exp(-(p * np.log(p)).sum())),
            "tokens_counted": float(total),
        }
