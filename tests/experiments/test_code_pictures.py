"""Pictures of codes: stitched, drawn from marginals, colored."""

from __future__ import annotations

import numpy as np

from uvim_fsq.experiments.code_pictures import code_colors, sample_marginals, stitch
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.oracle.quantizers.vq import VQ


def test_stitched_tokens_are_the_halves() -> None:
    upper, lower = np.arange(36), np.arange(100, 136)
    both = stitch(upper, lower)
    assert np.array_equal(both[:18], upper[:18]) and np.array_equal(both[18:], lower[18:])
    # An odd side is split between rows, never within one.
    both = stitch(np.arange(9), np.arange(100, 109))
    assert both.tolist() == [0, 1, 2, 103, 104, 105, 106, 107, 108]


def test_marginals_respect_the_counts() -> None:
    tokens = np.stack([np.full(1000, 7), np.random.default_rng(0).choice([1, 2], 1000, p=[0.25, 0.75])], axis=1)
    anywhere = sample_marginals(tokens, 4000, np.random.default_rng(1), own_position=False)
    share = np.bincount(anywhere.ravel(), minlength=8) / anywhere.size
    expected = np.bincount(tokens.ravel(), minlength=8) / tokens.size
    np.testing.assert_allclose(share, expected, atol=0.02)
    assert set(anywhere[:, 0]) == {1, 2, 7}
    own = sample_marginals(tokens, 4000, np.random.default_rng(1), own_position=True)
    assert set(own[:, 0]) == {7} and abs((own[:, 1] == 2).mean() - (tokens[:, 1] == 2).mean()) < 0.03


def test_code_colors_put_close_codes_together() -> None:
    counts = np.ones(25)
    colors = code_colors(FSQ((5, 5)), counts).astype(int)
    assert colors.shape == (25, 3) and len(np.unique(colors, axis=0)) == 25 and (colors[:, 2] == 128).all()
    # Code 1 is one level from code 0, code 24 is the opposite corner.
    assert np.abs(colors[1] - colors[0]).sum() < np.abs(colors[24] - colors[0]).sum()
    assert code_colors(VQ(16, 8), np.eye(16)[3]).shape == (16, 3)
