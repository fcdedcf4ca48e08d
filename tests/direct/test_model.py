"""The direct model: its grids, its loss and its counted cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.evaluation import shake
from tests.support.small import TASKS, random_batch
from uvim_fsq.config.schema import DirectModelConfig, EncoderConfig
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.errors import UserError
from uvim_fsq.layers import resize_grid, resize_tokens
from uvim_fsq.tasks.base import Categorical, Real

ENCODER = EncoderConfig("vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
CHANNELS = {"classes": Categorical(7), "reals": Real(2)}


def model(patch_size: int = 4, channels: Any = CHANNELS, **changes: Any) -> DirectModel:
    """A model for images of 16 x 16, with random weights; the encoder has patches of 8 pixels."""
    torch.manual_seed(0)
    config = DirectModelConfig(ENCODER, patch_size, width=24, depth=1, num_heads=2, mlp_dim=32)
    direct = DirectModel(config, channels, 16).eval()
    shake(direct)
    return direct


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image_whatever_the_label_patch(patch_size: int) -> None:
    direct, image = model(patch_size), torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    assert direct.hidden(image).shape == (3, (16 // patch_size) ** 2, 24)
    (logits,) = direct.iter_logits(image)
    assert {name: tuple(x.shape) for name, x in logits.items()} == {
        "classes": (3, 16, 16, 7),
        "reals": (3, 16, 16, 2),
    }


@torch.inference_mode()
def test_features_of_an_oblong_grid_reach_the_label_patches_they_lie_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of encoders whose last stage is not square: 2 rows of 4 columns; the left half of the image differs."""
    direct = model()
    features = torch.zeros(1, 2, 4, 16)
    features[:, :, :2] = 1.0
    monkeypatch.setattr(direct.encoder, "grid", (2, 4))
    monkeypatch.setattr(direct.encoder, "forward", lambda image: features.flatten(1, 2))
    monkeypatch.setattr(direct.blocks, "forward", lambda x: x)
    found = (direct.hidden(torch.zeros(1, 3, 16, 16)) - direct.positions).view(4, 4, 24)
    stem = direct.stem(torch.tensor([[0.0], [1.0]]).expand(2, 16))
    torch.testing.assert_close(found[:, 0], stem[1].expand(4, -1))
    torch.testing.assert_close(found[:, 3], stem[0].expand(4, -1))


def test_a_square_grid_is_resized_as_tokens_are() -> None:
    x = torch.randn(2, 16, 5)
    assert torch.equal(resize_grid(x, (4, 4), (2, 2)), resize_tokens(x, 4))
    assert resize_grid(x, (2, 8), (2, 8)) is x
    assert resize_grid(x, (2, 8), (4, 4)).shape == x.shape


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_that_of_the_task_on_the_logits(name: str) -> None:
    task = TASKS[name]
    direct = model(channels=task.label_channels)
    labels, image = random_batch(task, 3)
    (logits,) = direct.iter_logits(image)
    flat = ({key: x.flatten(1, 2) for key, x in maps.items()} for maps in (logits, labels))
    expected, expected_logs = task.loss(*flat)
    value, logs = direct(labels, image, task.loss)
    torch.testing.assert_close(value, expected)
    assert logs.keys() == expected_logs.keys()


def test_an_image_loss_gets_whole_maps_and_is_added() -> None:
    task = TASKS["depth"]
    direct = model(channels=task.label_channels)
    labels, image = random_batch(task, 2)

    def image_loss(logits: Any, given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert logits["depth"].shape == (2, 16, 16, 16) and given is labels
        return torch.tensor([3.0, 5.0]), {"extra": torch.ones(2)}

    plain, _ = direct(labels, image, task.loss)
    value, logs = direct(labels, image, task.loss, image_loss)
    torch.testing.assert_close(value, plain + torch.tensor([3.0, 5.0]))
    assert "extra" in logs


def test_a_new_model_predicts_no_class_before_another() -> None:
    (logits,) = DirectModel(model().config, CHANNELS, 16).iter_logits(torch.rand(1, 3, 16, 16))
    assert not logits["classes"].any()


def test_the_stem_is_initialized_as_a_transformers_layer() -> None:
    """Xavier-uniform, in place of torch's smaller weights and random biases."""
    stem = DirectModel(model().config, CHANNELS, 16).stem
    bound = (6 / (16 + 24)) ** 0.5
    assert not stem.bias.any() and 0.9 * bound < float(stem.weight.abs().max()) <= bound


def test_a_label_patch_must_divide_the_image() -> None:
    with pytest.raises(UserError, match="data.image_size=16 is not divisible by model.patch_size=6"):
        model(6)


def test_counted_flop_equal_those_of_torchs_counter() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        direct = DirectModel(model().config, CHANNELS, 16)
        direct.label_head(direct.hidden(torch.empty(1, 3, 16, 16)))
    assert counter.get_total_flops() == direct.cost().forward
