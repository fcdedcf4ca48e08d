"""The label embedding equals a product with one-hot labels, within MAX_LOGITS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.label_embedding import CategoricalEmbed, ChunkedOneHotLinear, LabelEmbed, embedding_bag_linear
from uvim_fsq.tasks.base import Categorical, Real

CHANNELS = {"classes": Categorical(7), "reals": Real(2)}


def labels_of(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    classes = torch.randint(-1, 7, (2, 16, 16), generator=g).to(torch.int16)
    return {"classes": classes, "reals": torch.rand(2, 16, 16, 2, generator=g) * 2 - 1}


def test_label_embeddings_add_up() -> None:
    """Each channel's own, of the deviation of a linear map with that many inputs; without labels the bias is left."""
    torch.manual_seed(0)
    channels = {**CHANNELS, "more": Categorical(50)}
    embed, labels = LabelEmbed(channels, 4, 64), {**labels_of(), "more": labels_of(1)["classes"]}
    parts = [LabelEmbed({name: channel}, 4, 64) for name, channel in channels.items()]
    for part in parts:
        part.load_state_dict({k: v for k, v in embed.state_dict().items() if k in part.state_dict()})
    torch.testing.assert_close(embed(labels), sum(part(labels) for part in parts))
    for name, numbers in (("classes", 16 * 7), ("more", 16 * 50)):
        weight, bias = embed.channels[name].weight, embed.channels[name].bias
        assert weight.shape == (numbers, 64) and float(weight.std()) == pytest.approx(numbers**-0.5, rel=0.03)
        assert abs(float(weight.mean())) < 0.05 * numbers**-0.5 and not bias.any()
        torch.nn.init.normal_(bias)
        nothing = torch.full((1, 1, 16), -1, dtype=torch.int16)
        torch.testing.assert_close(embed.channels[name](nothing)[0, 0], bias)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor made inside, leaving out those of the shapes in `but`."""

    def __init__(self, *but: torch.Size) -> None:
        super().__init__()
        self.numbers, self.but = 0, but

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.shape not in self.but:
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("form", [ChunkedOneHotLinear.apply, embedding_bag_linear], ids=["product", "rows"])
@pytest.mark.parametrize("budget", [1, 500, 2**28])
def test_label_embedding_is_the_one_hot_product(form: Callable, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MAX_LOGITS", budget)
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


@pytest.mark.parametrize("form", [ChunkedOneHotLinear.apply, embedding_bag_linear], ids=["product", "rows"])
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.uint8, 256), (torch.uint8, 257), (torch.uint8, 600), (torch.int8, 128), (torch.int8, 300)],
)
def test_labels_of_a_type_that_holds_fewer_classes(form: Callable, dtype: torch.dtype, classes: int) -> None:
    """Each label is one class, not also those that are equal to it modulo 256."""
    weight = torch.randn(4 * classes, 3, requires_grad=True)
    patches = torch.arange(128).view(4, 8, 4).to(dtype)
    patches[1, 0, 0] = torch.iinfo(dtype).max
    expected = F.one_hot(patches.long(), classes).flatten(2).float() @ weight
    found, gradient = form(patches, weight), torch.randn(4, 8, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, weight, gradient), torch.autograd.grad(expected, weight, gradient)
    )


def test_pieces_of_one_hot_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch at a time at least; labels are compared in their own type, which is quickest, wherever that is right."""
    patches = torch.randint(0, 7, (2, 3, 16)).to(torch.uint8)
    for budget, sizes in ((1, [1] * 6), (4 * 16 * 7, [4, 2]), (2**28, [6])):
        monkeypatch.setattr(chunking, "MAX_LOGITS", budget)
        assert [len(x) for _, x in ChunkedOneHotLinear._pieces(patches, 7, torch.float32)] == sizes
    made: list[torch.dtype] = []
    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, **keys: made.append(keys["dtype"]) or real(*sizes, **keys))
    for classes in (7, 256, 257):
        list(ChunkedOneHotLinear._pieces(patches, classes, torch.float32))
    assert made == [torch.uint8, torch.uint8, torch.int32]


def test_one_hot_labels_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MAX_LOGITS", 1000)
    weight = torch.randn(16 * 7, 5, requires_grad=True)
    for batch in (1, 4):
        patches = torch.randint(-1, 7, (batch, 16, 16)).to(torch.int16)
        with Largest(patches.shape) as largest:
            ChunkedOneHotLinear.apply(patches, weight).sum().backward()
        assert 800 < largest.numbers <= 1000  # 8 patches of 16 pixels and 7 classes
