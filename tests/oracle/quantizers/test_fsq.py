"""FSQ: properties that hold for every input (FSQ paper, section 3)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uvim_fsq.config.rules import resolve_levels
from uvim_fsq.config.schema import LEVEL_PRESETS
from uvim_fsq.errors import UserError
from uvim_fsq.oracle.quantizers.fsq import FSQ

LEVELS = st.lists(st.integers(5, 9), min_size=1, max_size=4)


@given(LEVELS)
@settings(max_examples=25, deadline=None)
def test_indices_and_codes_of_the_whole_codebook_convert_back(levels: list[int]) -> None:
    quantizer = FSQ(levels)
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert codes.unique(dim=0).shape[0] == quantizer.codebook_size
    assert codes.min() >= -1 and codes.max() <= 1


@given(LEVELS, st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_codes_are_those_of_their_indices(levels: list[int], seed: int) -> None:
    quantizer = FSQ(levels)
    z = torch.randn(3, 7, len(levels), generator=torch.Generator().manual_seed(seed)) * 3
    codes, indices, *_ = quantizer(z)
    assert indices.dtype == torch.int64
    assert int(indices.min()) >= 0 and int(indices.max()) < quantizer.codebook_size
    torch.testing.assert_close(codes, quantizer.indices_to_codes(indices))


@pytest.mark.parametrize("name", LEVEL_PRESETS)
def test_presets_have_their_published_codebook_sizes(name: str) -> None:
    sizes = {"2^8": 240, "2^10": 1000, "2^12": 4375, "2^14": 15360, "2^16": 64000}
    assert FSQ(name).codebook_size == sizes[name]


def test_results_are_float32_inside_autocast() -> None:
    quantizer = FSQ([8, 6, 5])
    assert not quantizer.state_dict()  # everything follows from the levels
    for z in (torch.randn(512, 3) * 2, torch.randn(512, 3).bfloat16() * 2):
        outside = quantizer(z.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = quantizer(z)
        assert inside.codes.dtype == torch.float32
        assert torch.equal(outside.codes, inside.codes) and torch.equal(outside.indices, inside.indices)
        assert torch.equal(quantizer.codes_to_indices(outside.codes.bfloat16()), outside.indices)


def test_the_centered_shift_maps_zero_to_zero() -> None:
    assert abs(float(FSQ([8], shift="centered").bound(torch.zeros(1)))) < 1e-6


def test_the_published_shift_maps_zero_to_the_papers_value() -> None:
    expected = math.tanh(math.tan(0.5 / (7 * 0.999 / 2))) * 7 * 0.999 / 2 - 0.5
    assert abs(float(FSQ([8]).bound(torch.zeros(1))) - expected) < 1e-6


def test_impossible_levels_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        FSQ([5, 1])
    with pytest.raises(UserError, match="2\\^31"):
        FSQ([9] * 12)
    with pytest.raises(UserError, match="2147483648 codes; the product must stay below 2\\^31"):
        FSQ([8] * 10 + [2])
    assert resolve_levels([8] * 10) == (8,) * 10  # 2^30
    with pytest.raises(UserError, match="undefined for 2 levels"):
        FSQ([2, 5], shift="centered")
    with pytest.raises(UserError, match="preset"):
        FSQ("2^9")


def test_few_levels_give_a_warning_at_the_callers_line(recwarn: pytest.WarningsRecorder) -> None:
    FSQ([5, 8])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"FSQ levels \[8, 4\]: fewer than 5 per channel") as warned:
        FSQ([8, 4])
    assert warned[0].filename == __file__


@pytest.mark.gpu
def test_fsq_inside_cuda_autocast() -> None:
    quantizer, z = FSQ([8, 6, 5]), torch.randn(64, 3) * 2
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = quantizer.cuda()(z.cuda())
    assert found.codes.dtype == torch.float32
    assert torch.equal(found.indices.cpu(), FSQ([8, 6, 5])(z).indices)
