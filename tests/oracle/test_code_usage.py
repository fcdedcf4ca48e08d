"""Statistics of used codes."""

from __future__ import annotations

import torch

from uvim_fsq.oracle.code_usage import CodeStatistics
from uvim_fsq.oracle.quantizers.fsq import FSQ


def test_statistics_are_summed_over_processes() -> None:
    quantizer = FSQ([5, 5])
    parts = [torch.randint(0, 25, (40,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    one, two, both = (CodeStatistics(quantizer) for _ in range(3))
    one.update(parts[0])
    two.update(parts[1])
    both.update(torch.cat(parts))
    one.load_state({"code_counts": one.state()["code_counts"] + two.state()["code_counts"]})
    assert one.compute() == both.compute()
    assert [sum(histogram) for histogram in both.level_histogram()] == [80, 80]
    uniform = CodeStatistics(quantizer)
    uniform.update(torch.arange(25))
    assert uniform.compute()["codebook_usage"] == 1.0
    assert abs(uniform.compute()["code_perplexity"] - 25) < 1e-9
