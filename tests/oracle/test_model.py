"""The oracle: context, zero-initialized heads, code dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.oracles import CHANNELS, CONFIG, image_of, labels_of
from uvim_fsq.oracle.model import Oracle, drop_codes


@pytest.mark.parametrize("context", ["both", "encoder", "decoder", "none"])
def test_context_reaches_only_the_parts_that_are_to_see_it(context: str) -> None:
    torch.manual_seed(0)
    oracle = Oracle(replace(CONFIG, context=context), CHANNELS, 16).eval()
    for head in oracle.label_head.heads.values():
        torch.nn.init.normal_(head.weight)  # they start at zero
    z = [oracle.encode(labels_of(), image_of(seed)) for seed in (0, 1)]
    codes = oracle.quantizer(z[0])[0]
    decoded = [oracle.decode(codes, image_of(seed))["classes"] for seed in (0, 1)]
    assert (context in ("both", "encoder")) != torch.equal(*z)
    assert (context in ("both", "decoder")) != torch.equal(*decoded)
    if context == "none":
        assert oracle.tokenize(labels_of()).shape == (2, 4)
    else:
        with pytest.raises(ValueError, match="needs the image"):
            oracle.decode(oracle.quantizer(oracle.encode(labels_of()))[0])


def test_logits_of_a_new_oracle_are_zero() -> None:
    oracle = Oracle(CONFIG, CHANNELS, 16)
    logits = oracle.detokenize(torch.zeros(2, 4, dtype=torch.long), image_of())
    assert logits["classes"].shape == (2, 16, 16, 7) and logits["reals"].shape == (2, 16, 16, 2)
    assert all(bool((x == 0).all()) for x in logits.values())


def test_code_dropout_keeps_half_of_the_codes() -> None:
    torch.manual_seed(0)
    codes = torch.ones(4000, 16, 2)
    random, ordered = drop_codes(codes, "random")[..., 0], drop_codes(codes, "ordered")[..., 0]
    for kept in (random, ordered):
        assert abs(float(kept.mean()) - 0.5) < 0.02
    assert float((random.mean(0) - 0.5).abs().max()) < 0.05  # no position is preferred
    assert bool((ordered[:, :-1] >= ordered[:, 1:]).all())  # the first codes survive longest
    assert drop_codes(codes, "none") is codes
