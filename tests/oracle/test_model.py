"""The oracle: context, zero-initialized heads, code dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.oracles import CHANNELS, CONFIG, image_of, labels_of
from uvim_fsq.config.schema import QuantizerConfig
from uvim_fsq.oracle import model
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


def test_a_learned_dropped_code_differs_from_every_codeword() -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(levels=(5, 5))  # with a codeword of zeros
    zero, learned = (
        Oracle(replace(CONFIG, dropped_code=kind, quantizer=quantizer), CHANNELS, 16).eval()
        for kind in ("zero", "learned")
    )
    for oracle, distinct in ((zero, False), (learned, True)):
        center = oracle.quantizer.codes_to_indices(torch.zeros(1, oracle.code_length, 2))
        codes = oracle.quantizer.indices_to_codes(center)
        assert not codes.any()
        hidden = [oracle.decode_hidden(x, image_of()[:1]) for x in (codes, oracle.empty_codes(1))]
        assert torch.equal(*hidden) != distinct


def test_code_dropout_drops_the_presence_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(replace(CONFIG, dropped_code="learned"), CHANNELS, 16)
    seen = []
    monkeypatch.setattr(oracle, "decode_hidden", lambda codes, *_: seen.append(codes) or torch.zeros(2, 16, 16))
    monkeypatch.setattr(model, "drop_codes", lambda codes, _: codes * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None])
    for training in (True, False):
        oracle.train(training)(labels_of(), image_of(), lambda *_: (torch.zeros(2), {}))
    dim = oracle.quantizer.dim
    assert seen[0][..., dim].tolist() == [[1, 0, 1, 0]] * 2 and not seen[0][:, 1::2].any()
    assert bool((seen[1][..., dim] == 1).all()) and seen[1].shape[-1] == dim + 1


def test_a_scaled_code_moves_from_dropped_to_present() -> None:
    torch.manual_seed(0)
    oracle = Oracle(replace(CONFIG, dropped_code="learned"), CHANNELS, 16).eval()
    codes = oracle.quantizer.indices_to_codes(torch.arange(8).view(2, 4))
    marked = oracle.mark_present(codes)
    assert oracle.mark_present(marked) is marked
    for scale, same in ((0.0, oracle.empty_codes(2)), (1.0, codes)):
        torch.testing.assert_close(
            oracle.decode_hidden(marked * scale, image_of()), oracle.decode_hidden(same, image_of())
        )
