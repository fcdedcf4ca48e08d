"""The label embedding equals a product with one-hot labels, within MAX_LOGITS."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.support.largest_tensor import LargestTensor
from tests.support.oracles import CHANNELS, labels_of
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.label_embedding import CategoricalEmbed, ChunkedOneHotLinear, LabelEmbed, embedding_bag_linear
from uvim_fsq.tasks.base import Categorical


def test_the_embeddings_of_all_channels_are_added() -> None:
    torch.manual_seed(0)
    channels = {**CHANNELS, "more": Categorical(50)}
    embed, labels = LabelEmbed(channels, 4, 64), {**labels_of(), "more": labels_of(1)["classes"]}
    parts = [LabelEmbed({name: channel}, 4, 64) for name, channel in channels.items()]
    for part in parts:
        part.load_state_dict({k: v for k, v in embed.state_dict().items() if k in part.state_dict()})
    torch.testing.assert_close(embed(labels), sum(part(labels) for part in parts))


def test_a_categorical_embedding_is_initialized_like_a_linear_map() -> None:
    torch.manual_seed(0)
    embed = LabelEmbed({"classes": Categorical(7), "more": Categorical(50)}, 4, 64)
    for name, numbers in (("classes", 16 * 7), ("more", 16 * 50)):
        weight, bias = embed.channels[name].weight, embed.channels[name].bias
        assert weight.shape == (numbers, 64) and float(weight.std()) == pytest.approx(numbers**-0.5, rel=0.03)
        assert abs(float(weight.mean())) < 0.05 * numbers**-0.5 and not bias.any()


def test_pixels_without_a_label_add_nothing_to_the_bias() -> None:
    embed = CategoricalEmbed(7, 16, 64)
    torch.nn.init.normal_(embed.bias)
    unlabeled = torch.full((1, 1, 16), -1, dtype=torch.int16)
    torch.testing.assert_close(embed(unlabeled)[0, 0], embed.bias)


@pytest.mark.parametrize("form", [ChunkedOneHotLinear.apply, embedding_bag_linear], ids=["one-hot", "bag"])
@pytest.mark.parametrize("limit", [1, 500, 2**28])
def test_the_embedding_equals_a_one_hot_product(form: Callable, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
    torch.manual_seed(0)
    weight = torch.randn(16 * 7, 5, requires_grad=True)
    patches = torch.randint(-1, 7, (2, 3, 16)).to(torch.int16)
    one_hot = F.one_hot(patches.long().clamp_min(0), 7) * (patches >= 0).unsqueeze(-1)
    expected, gradient = one_hot.flatten(2).float() @ weight, torch.randn(2, 3, 5)
    found = form(patches, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, weight, gradient), torch.autograd.grad(expected, weight, gradient)
    )
    embed = CategoricalEmbed(7, 16, 5)
    torch.testing.assert_close(embed(patches), one_hot.flatten(2).float() @ embed.weight + embed.bias)


@pytest.mark.parametrize("form", [ChunkedOneHotLinear.apply, embedding_bag_linear], ids=["one-hot", "bag"])
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.uint8, 256), (torch.uint8, 257), (torch.uint8, 600), (torch.int8, 128), (torch.int8, 300)],
)
def test_classes_do_not_wrap_around_in_a_small_integer_type(form: Callable, dtype: torch.dtype, classes: int) -> None:
    weight = torch.randn(4 * classes, 3, requires_grad=True)
    patches = torch.arange(128).view(4, 8, 4).to(dtype)
    patches[1, 0, 0] = torch.iinfo(dtype).max
    expected = F.one_hot(patches.long(), classes).flatten(2).float() @ weight
    found, gradient = form(patches, weight), torch.randn(4, 8, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, weight, gradient), torch.autograd.grad(expected, weight, gradient)
    )


def test_a_chunk_of_one_hot_labels_holds_at_least_one_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = torch.randint(0, 7, (2, 3, 16)).to(torch.uint8)
    for limit, sizes in ((1, [1] * 6), (4 * 16 * 7, [4, 2]), (2**28, [6])):
        monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
        assert [len(x) for _, x in ChunkedOneHotLinear._one_hots(patches, 7, torch.float32)] == sizes


def test_labels_are_compared_in_their_own_type_where_it_holds_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = torch.randint(0, 7, (2, 3, 16)).to(torch.uint8)
    made: list[torch.dtype] = []
    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, **keys: made.append(keys["dtype"]) or real(*sizes, **keys))
    for classes in (7, 256, 257):
        list(ChunkedOneHotLinear._one_hots(patches, classes, torch.float32))
    assert made == [torch.uint8, torch.uint8, torch.int32]


def test_one_hot_labels_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MAX_LOGITS", 1000)
    weight = torch.randn(16 * 7, 5, requires_grad=True)
    for batch in (1, 4):
        patches = torch.randint(-1, 7, (batch, 16, 16)).to(torch.int16)
        with LargestTensor(patches.shape) as largest:
            ChunkedOneHotLinear.apply(patches, weight).sum().backward()
        assert 800 < largest.numbers <= 1000  # 8 patches of 16 pixels and 7 classes
