"""Quantizer and decoding next to other implementations."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.benchmark import by_name, small_sizes, tiny_lm, without
from tests.support.small import generate
from uvim_fsq.benchmark import compare, side_by_side
from uvim_fsq.oracle.quantizers.fsq import FSQ

CPU = torch.device("cpu")


def test_the_quantizer_is_timed_without_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "vector_quantize_pytorch")
    lines = by_name(side_by_side.compare_quantizers((7, 5), (2, 6), CPU, 1))
    assert list(lines) == ["quantizer forward, 2 x 6 x 2, ours", "quantizer forward and backward, 2 x 6 x 2, ours"]
    for line in lines.values():
        assert line.other["vector-quantize-pytorch"] == "not installed: pip install 'uvim-fsq[benchmark]'"


def test_quantizer_compared_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package in the same place, here our own FSQ."""
    other = SimpleNamespace(FSQ=lambda levels: FSQ(levels, shift="centered"))
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", other)
    lines = by_name(side_by_side.compare_quantizers((8, 5), (2, 6), CPU, 1))
    assert len(lines) == 4 and lines["quantizer forward, 2 x 6 x 2, ours"].other["fraction of equal indices"] == 1.0
    z = torch.randn(3, 4, 2)
    variants = side_by_side.quantizer_variants(FSQ((7, 5)), FSQ((7, 5)), z, backward=True)
    (ours,), (theirs,) = variants["ours"](), variants["vector-quantize-pytorch"]()
    # Straight through the rounding: the slope of tanh(z) * half_l / half_width.
    slope = (1 - torch.tanh(z) ** 2) * torch.tensor([6, 4]) * 0.999 / 2 / torch.tensor([3, 2])
    torch.testing.assert_close(ours, slope)
    torch.testing.assert_close(theirs, slope)


@pytest.mark.parametrize("levels", [(7, 5, 5, 5, 5), (8, 8), (8, 6, 5)])
def test_vector_quantize_pytorch_gives_our_codes(levels: tuple[int, ...]) -> None:
    """Indices count alike, and codes are equal wherever a value is not next to a rounding border."""
    module = pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = FSQ(levels, shift="centered"), module.FSQ(list(levels))
    z = 2 * torch.randn(4, 500, len(levels), generator=torch.Generator().manual_seed(0))
    codes, indices = ours(z)[:2]
    other_codes, other_indices = theirs(z)
    bounded = ours.bound(z)
    clear = ((bounded - bounded.floor() - 0.5).abs() > 0.01).all(-1)
    assert clear.double().mean() > 0.8
    torch.testing.assert_close(codes[clear], other_codes[clear])
    torch.testing.assert_close(indices[clear], other_indices[clear].long())
    lines = by_name(side_by_side.compare_quantizers(levels, (4, 16), CPU, 1))
    assert lines[f"quantizer forward, 4 x 16 x {len(levels)}, ours"].other["fraction of equal indices"] > 0.9
    assert lines[f"quantizer forward, 4 x 16 x {len(levels)}, vector-quantize-pytorch"].other["time / ours"] > 0


def test_naive_loop_gives_the_cached_tokens() -> None:
    lm, images = tiny_lm(), torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = side_by_side.naive_generate(lm, images)
    assert len(tokens.unique()) > 3
    torch.testing.assert_close(tokens, generate(lm, images))


def test_decoding_is_timed_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "transformers")
    lines = by_name(side_by_side.compare_decoding(tiny_lm(), 1, batches=(2,)))
    assert list(lines) == ["decoding, batch 2, ours", "decoding, batch 2, naive loop"]
    assert lines["decoding, batch 2, ours"].other["transformers"].startswith("not installed")
    assert lines["decoding, batch 2, ours"].other["tokens equal to naive loop"] == 1.0
    assert lines["decoding, batch 2, naive loop"].unit == "images/s"


def test_a_configuration_gives_its_quantizer_and_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *compare.PACKAGES)
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (8, 4))
    sizes = small_sizes()
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    assert [name for name in lines if "forward," in name] == [
        "quantizer forward, 32 x 4 x 2, ours",
        "quantizer forward, 8 x 4 x 2, ours",
    ]
    assert [name for name in lines if "naive" in name] == [f"decoding, batch {b}, naive loop" for b in (1, 32)]
    sizes = small_sizes("model.quantizer.kind=vq", "model.quantizer.codebook_size=9")
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    assert not [name for name in lines if "quantizer" in name] and len(lines) == 4
