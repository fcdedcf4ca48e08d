"""The oracle: context, zero-initialized heads, code dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uvim_fsq.config.schema import OracleModelConfig, QuantizerConfig
from uvim_fsq.oracle.model import Oracle, drop_codes
from uvim_fsq.tasks.base import Categorical, Real

CONFIG = OracleModelConfig(
    patch_size=4,
    width=16,
    encoder_depth=1,
    decoder_depth=1,
    num_heads=2,
    mlp_dim=32,
    code_length=4,
    quantizer=QuantizerConfig(levels=(5, 5)),
)


CHANNELS = {"classes": Categorical(7), "reals": Real(2)}


def labels_of(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    classes = torch.randint(-1, 7, (2, 16, 16), generator=g).to(torch.int16)
    return {"classes": classes, "reals": torch.rand(2, 16, 16, 2, generator=g) * 2 - 1}


def image_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("context", ["both", "encoder", "decoder", "none"])
def test_context_reaches_only_where_it_should(context: str) -> None:
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


def test_heads_start_at_zero() -> None:
    oracle = Oracle(CONFIG, CHANNELS, 16)
    logits = oracle.detokenize(torch.zeros(2, 4, dtype=torch.long), image_of())
    assert logits["classes"].shape == (2, 16, 16, 7) and logits["reals"].shape == (2, 16, 16, 2)
    assert all(bool((x == 0).all()) for x in logits.values())


def test_code_dropout() -> None:
    torch.manual_seed(0)
    codes = torch.ones(4000, 16, 2)
    random, ordered = drop_codes(codes, "random")[..., 0], drop_codes(codes, "ordered")[..., 0]
    for kept in (random, ordered):
        assert abs(float(kept.mean()) - 0.5) < 0.02
    assert float((random.mean(0) - 0.5).abs().max()) < 0.05  # no position is preferred
    assert bool((ordered[:, :-1] >= ordered[:, 1:]).all())  # the first codes survive longest
    assert drop_codes(codes, "none") is codes
