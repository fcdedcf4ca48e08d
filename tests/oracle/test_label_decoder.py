"""The trained copy of an oracle's decoder."""

from __future__ import annotations

import pytest
import torch

from tests.support.oracles import CHANNELS, CONFIG, image_of, labels_of
from uvim_fsq.oracle.label_decoder import TrainedDecoder
from uvim_fsq.oracle.model import Oracle


@pytest.fixture
def oracle() -> Oracle:
    torch.manual_seed(0)
    oracle = Oracle(CONFIG, CHANNELS, 16)
    for head in oracle.label_head.heads.values():
        torch.nn.init.normal_(head.weight, std=0.3)
    return oracle.eval().requires_grad_(False)


def codes_of(oracle: Oracle) -> torch.Tensor:
    return oracle.quantizer.indices_to_codes(torch.arange(8).view(2, 4))


def test_a_new_copy_predicts_what_the_oracle_predicts_whatever_the_features(oracle: Oracle) -> None:
    codes = codes_of(oracle)
    expected = oracle.decode(codes, image_of())
    for width, features in ((None, None), (6, torch.randn(2, 9, 6))):
        copied = TrainedDecoder(oracle, width)
        torch.testing.assert_close(copied.decode(codes, image_of(), features), expected, rtol=0, atol=0)


def test_features_are_resized_to_the_patches_and_added(oracle: Oracle) -> None:
    copied = TrainedDecoder(oracle, 6)
    projection = copied.feature_projection
    assert projection is not None
    torch.nn.init.normal_(projection.weight)
    # One feature of four quarters; the decoder has 4 x 4 patches.
    features = torch.zeros(2, 4, 6)
    features[:, 0, 2] = 1
    seen = []
    copied.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for given in (torch.zeros_like(features), features):
        copied.decode_hidden(codes_of(oracle), image_of(), given)
    added = (seen[1] - seen[0]) @ projection.weight[:, 2] / projection.weight[:, 2].square().sum()
    rows = added[0].view(4, 4)
    assert float(rows[0, 0]) == pytest.approx(1, abs=1e-4) and float(rows[3, 3]) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(rows[0], torch.tensor([1.0, 0.75, 0.25, 0.0]), rtol=1e-3, atol=1e-4)


def test_a_decoder_that_needs_features_says_so(oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="image features"):
        TrainedDecoder(oracle, 6).decode(codes_of(oracle), image_of())


def test_training_the_copy_leaves_the_oracle_alone(oracle: Oracle) -> None:
    copied = TrainedDecoder(oracle, 6)

    def loss(logits: dict[str, torch.Tensor], _: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.stack([x.square().mean((1, 2)).sum(-1) for x in logits.values()]).sum(0), {}

    value, _ = copied.label_loss(codes_of(oracle), labels_of(), image_of(), loss, features=torch.randn(2, 4, 6))
    value.sum().backward()
    shared = {p.data_ptr() for p in oracle.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert not shared and all(p.grad is None for p in oracle.parameters())
    assert all(p.grad is not None for p in copied.parameters())
