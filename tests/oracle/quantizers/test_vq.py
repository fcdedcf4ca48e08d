"""VQ: the codebook against a line-by-line calculation, splitting, and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.small import oracle_run
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.oracle.quantizers.vq import RARE, VQ
from uvim_fsq.reports.evaluation_page import write_run_page
from uvim_fsq.training.run import train

KEYS = ("model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8")


def test_forward_is_the_nearest_codeword_and_passes_gradients_straight() -> None:
    torch.manual_seed(0)
    vq = VQ(12, 8)
    z = torch.randn(3, 5, 8, requires_grad=True)
    codes, indices, *_ = vq(z)
    words = vq.sums / vq.counts[:, None]
    words = words / words.norm(dim=1, keepdim=True)
    standard = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(indices, torch.cdist(standard.detach(), words[None]).argmin(-1))
    torch.testing.assert_close(codes.detach(), words[indices])
    weights = torch.randn(8)
    (codes * weights).sum().backward()
    other = z.detach().clone().requires_grad_()
    (VQ.standardize(other) * weights).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    assert torch.equal(vq.codes_to_indices(codes.detach()), indices)
    torch.testing.assert_close(vq.indices_to_codes(indices), codes.detach())


def test_an_update_adds_what_was_accumulated_in_all_processes() -> None:
    vq = VQ(3, 2, split=False)
    counts, sums = vq.counts.clone(), vq.sums.clone()
    z, indices = torch.tensor([[1.0, 3.0], [5.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 2, 1])
    vq.accumulate(z[:1], indices[:1])  # two micro batches of one step
    vq.accumulate(z[1:], indices[1:])
    assert torch.equal(vq.counts, counts)
    vq.ema_update(lambda x: 2 * x, seed=0)  # as from two equal processes
    torch.testing.assert_close(vq.counts, 0.995 * counts + torch.tensor([0.0, 4.0, 2.0]))
    standard = VQ.standardize(z)
    expected = torch.stack([torch.zeros(2), 2 * (standard[0] + standard[2]), 2 * standard[1]])
    torch.testing.assert_close(vq.sums, 0.995 * sums + expected)
    after = vq.counts.clone()
    vq.ema_update(lambda x: x, seed=0)
    assert torch.equal(vq.counts, after)  # nothing was accumulated since


def test_splitting_halves_the_most_frequent_codeword() -> None:
    vq = VQ(4, 3)
    vq.counts.copy_(torch.tensor([8.0, 0.05, 1.0, 0.01]))
    before = vq.sums.clone()
    vq.accumulate(torch.randn(1, 3), torch.tensor([2]))
    vq.ema_update(lambda x: torch.zeros_like(x), seed=1)
    # 3, the rarest, takes half of 0; then 1 takes half of the now most frequent, 0 or 3.
    assert sorted(vq.counts.tolist()) == pytest.approx(sorted(0.995 * x for x in (4.0, 2.0, 2.0, 1.0)))
    assert float(vq.counts.sum()) == pytest.approx(0.995 * 9.0)
    for row in (1, 3):
        share = vq.sums[row] / (0.995 * before[0])
        assert bool(((share > 0.24) & (share < 0.51)).all()) and len(set(share.tolist())) == 3  # noise per entry
        assert torch.cosine_similarity(vq.sums[row], before[0], 0) > 0.99999
    torch.testing.assert_close(vq.sums[2], 0.995 * before[2])


def test_standardization_adds_epsilon_to_the_variance() -> None:
    z = torch.tensor([[0.0, 0.002, 0.004, 0.006]])  # the variance is 5e-6, half of epsilon
    expected = (z - 0.003) / 1.5e-5**0.5
    torch.testing.assert_close(VQ.standardize(z), expected, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (z, z.bfloat16()):
            found = VQ.standardize(given)
            assert found.dtype == torch.float32 and torch.equal(found, VQ.standardize(given.float()))


def test_results_are_float32_inside_autocast() -> None:
    torch.manual_seed(0)
    vq, z = VQ(500, 8), torch.randn(2000, 8)
    codes, indices, *_ = vq(z)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vq(z)
        low = (VQ.standardize(z) @ vq.codebook().T).argmax(-1)
        assert torch.equal(vq.codes_to_indices(codes), indices)
    assert torch.equal(inside.codes, codes) and torch.equal(inside.indices, indices)
    assert not torch.equal(low, indices)  # else this would test nothing


def test_a_new_codebook_has_unit_counts_and_random_sums() -> None:
    vq = VQ(1024, 64)
    assert torch.equal(vq.counts, torch.ones(1024))
    assert float(vq.sums.std()) == pytest.approx(1024**-0.5, rel=0.02) and abs(float(vq.sums.mean())) < 1e-3


def update_without_tokens(vq: VQ) -> None:
    vq.accumulate(torch.zeros(0, vq.dim), torch.zeros(0, dtype=torch.long))
    vq.ema_update(lambda x: x, seed=7)


def test_only_codewords_below_the_limit_are_revived() -> None:
    vq = VQ(3, 4, momentum=1.0)
    for count in (0.11, RARE):
        vq.counts.copy_(torch.tensor([5.0, count, 1.0]))
        update_without_tokens(vq)
        torch.testing.assert_close(vq.counts, torch.tensor([5.0, count, 1.0]))


def test_a_rare_codeword_gets_half_of_the_most_frequent_one_with_noise_from_the_seed() -> None:
    vq = VQ(3, 4, momentum=1.0)
    vq.counts.copy_(torch.tensor([5.0, 0.09, RARE]))
    sums = vq.sums.clone()
    update_without_tokens(vq)
    noise = torch.rand(4, generator=torch.Generator().manual_seed(7)) * 0.002 + 0.999
    torch.testing.assert_close(vq.counts, torch.tensor([2.5, 2.5, RARE]))
    half = sums[0] / 2
    torch.testing.assert_close(vq.sums, torch.stack([half, half * noise, sums[2]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("most", "split"), [(0.19, False), (2 * RARE, True)])
def test_a_codeword_whose_half_would_be_rare_is_not_split(most: float, split: bool) -> None:
    vq = VQ(2, 4, momentum=1.0)
    vq.counts.copy_(torch.tensor([most, 0.05]))
    update_without_tokens(vq)
    torch.testing.assert_close(vq.counts, torch.full((2,), most / 2) if split else torch.tensor([most, 0.05]))


def test_counts_decay_to_a_limit() -> None:
    vq = VQ(3, 2, momentum=0.5, split=False)
    vq.counts.copy_(torch.tensor([1.1e-12, 0.9e-12, 1.0]))
    sums = vq.sums.clone()
    update_without_tokens(vq)
    torch.testing.assert_close(vq.counts, torch.tensor([0.55e-12, 0.9e-12, 0.5]), rtol=1e-5, atol=0)
    torch.testing.assert_close(vq.sums, sums * torch.tensor([[0.5], [1.0], [0.5]]))


def test_splitting_ends_when_there_are_too_few_tokens() -> None:
    vq = VQ(50, 3)
    vq.counts.fill_(0.05)
    vq.accumulate(torch.randn(1, 3), torch.tensor([0]))
    vq.ema_update(lambda x: x, seed=0)
    assert bool(torch.isfinite(vq.codebook()).all()) and float(vq.counts.min()) < RARE


def test_an_unused_codeword_keeps_its_direction_without_splitting() -> None:
    vq = VQ(3, 4, split=False, momentum=0.5)
    before = vq.codebook()[2].clone()
    for _ in range(400):
        vq.accumulate(torch.randn(2, 4), torch.tensor([0, 1]))
        vq.ema_update(lambda x: x, seed=0)
    torch.testing.assert_close(vq.codebook()[2], before)
    assert bool(torch.isfinite(vq.codebook()).all())


@pytest.mark.slow
def test_a_vq_run_trains_resumes_and_evaluates(tmp_path: Path, data: Path) -> None:
    whole = train(oracle_run(tmp_path / "whole", data, *KEYS, "train.save_every=3", "model.quantizer.commitment=0.25"))
    found = load_checkpoint(whole).oracle.quantizer
    assert isinstance(found, VQ) and not torch.equal(found.counts, torch.ones(16))
    again = train(
        oracle_run(
            tmp_path / "again",
            data,
            *KEYS,
            f"train.resume={whole}/checkpoints/step_00000003",
            "model.quantizer.commitment=0.25",
        )
    )
    resumed = load_checkpoint(again).oracle.quantizer
    assert isinstance(resumed, VQ)
    torch.testing.assert_close(resumed.sums, found.sums)
    torch.testing.assert_close(resumed.counts, found.counts)
    result = evaluate(whole)
    write_run_page(tmp_path / "page.html", whole, [], result)
    assert 0 < result["figures"]["oracle"]["codebook_usage"] <= 1 and result["level_histogram"]["oracle"] == []
    assert len(result["code_counts"]["oracle"]) == 16
    assert np.isfinite(result["figures"]["context_only"]["rmse"])


@pytest.mark.parametrize("key", ["codebook_size=0", "momentum=1", "commitment=-1", "codeword_dim=0"])
def test_impossible_settings_are_refused(tmp_path: Path, data: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"model.quantizer.{key.split('=')[0]}"):
        oracle_run(tmp_path / "x", data, *KEYS[:1], f"model.quantizer.{key}")
