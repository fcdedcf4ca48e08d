"""Image encoders of any family: names and sizes, stages, frozen models, batch norms, stochastic depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.errors import UserError
from uvim_fsq.lm import timm_models
from uvim_fsq.lm.image_encoder import ImageEncoder, build_image_encoder


def random_images(side: int, count: int = 2) -> torch.Tensor:
    """(count, 3, side, side) uint8."""
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def build(name: str, side: int = 64, **config: Any) -> ImageEncoder:
    torch.manual_seed(0)
    return build_image_encoder(EncoderConfig(name, **config), side)


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


#: Name, image side, grid, width of one model of each family, with its own default stage.
FAMILIES = [
    ("test_vit", 32, (2, 2), 64),
    ("test_vit2", 32, (2, 2), 64),
    ("test_convnext", 64, (2, 2), 64),
    ("test_efficientnet", 64, (2, 2), 64),
    ("test_resnet", 64, (2, 2), 96),
    slow("vit_tiny_patch16_224", 32, (2, 2), 192),
    slow("deit_tiny_patch16_224", 32, (2, 2), 192),
    slow("deit3_small_patch16_224", 32, (2, 2), 384),
    slow("vit_tiny_r_s16_p8_224", 64, (2, 2), 192),
    slow("vit_small_patch14_dinov2", 28, (2, 2), 384),
    slow("vit_small_patch14_reg4_dinov2", 28, (2, 2), 384),
    slow("vit_small_patch16_dinov3", 32, (2, 2), 384),
    slow("vit_base_patch16_siglip_224.v2_webli", 32, (2, 2), 768),
    slow("eva02_tiny_patch14_224", 28, (2, 2), 192),
    slow("swin_tiny_patch4_window7_224", 64, (2, 2), 768),
    slow("hiera_tiny_224", 64, (2, 2), 768),
    slow("maxvit_rmlp_pico_rw_256", 64, (2, 2), 256),
    slow("test_coatnet", 64, (2, 2), 128),
    slow("pvt_v2_b0", 64, (2, 2), 256),
    slow("convnext_atto", 64, (2, 2), 320),
    slow("tf_efficientnet_lite0", 64, (2, 2), 320),
    slow("resnet10t", 64, (2, 2), 512),
    slow("hrnet_w18_small", 64, (2, 2), 1024),
]


@pytest.mark.parametrize(("name", "side", "grid", "width"), FAMILIES)
def test_a_family_has_features_and_gradients(name: str, side: int, grid: tuple[int, int], width: int) -> None:
    """Every trained parameter gets a gradient, as DistributedDataParallel demands."""
    encoder = build(name, side).train()
    assert (encoder.grid, encoder.num_features) == (grid, width)
    features = encoder(random_images(side))
    assert features.shape == (2, encoder.num_patches, width) and features.std() > 0.1
    features.square().sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained and [name for name, p in trained.items() if p.grad is None] == []
    assert set(encoder.depths()) == set(encoder.model.parameters())


@pytest.mark.parametrize(("name", "side"), [("test_vit2", 32), ("test_efficientnet", 64), ("test_resnet", 64)])
def test_what_the_features_do_not_need_is_removed(name: str, side: int) -> None:
    """The classifier, and the pooling before it."""
    encoder = build(name, side)
    classes = timm.create_model(name).num_classes
    assert not any(classes in p.shape for p in encoder.model.parameters())


def test_stages_count_from_the_first() -> None:
    first = build("test_resnet", stages=(0,))
    assert (first.grid, first.num_features) == ((32, 32), 32)
    assert torch.equal(first(random_images(64)), build("test_resnet", stages=(-5,))(random_images(64)))


def test_every_block_is_a_layer_of_its_own() -> None:
    encoder = build("test_vit", 32)
    depths = {name: encoder.depths()[p] for name, p in encoder.model.named_parameters()}
    assert [depths[f"blocks.{i}.attn.qkv.weight"] for i in range(6)] == [5, 4, 3, 2, 1, 0]
    assert depths["norm.weight"] == 0 and depths["pos_embed"] == 6
    encoder = build("test_convnext")
    depths = {name: encoder.depths()[p] for name, p in encoder.model.named_parameters()}
    assert [depths[f"stages.2.blocks.{i}.conv_dw.weight"] for i in range(4)] == [5, 4, 3, 2]


def test_tokens_and_positions_are_the_lowest_layer_whatever_timm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build("test_vit2", 32)
    # As in timm 1.0.20, which counts register tokens, and here all of them, as the last layer.
    groups = {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
    monkeypatch.setattr(encoder.model, "group_matcher", lambda coarse: groups)
    depths = {name: encoder.depths()[p] for name, p in encoder.model.named_parameters()}
    lowest = depths["patch_embed.proj.weight"]
    assert lowest == max(depths.values()) > 0
    assert {depth for name, depth in depths.items() if "." not in name} == {lowest}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("test_vit3", 32), ("test_coatnet", 64), ("test_resnet", 64)])
def test_costs_are_counted_without_weights(name: str, side: int) -> None:
    encoder = build(name, side)
    with torch.device("meta"):
        sizes = build_image_encoder(encoder.config, side)
    cost = encoder.cost()
    assert sizes.cost() == cost and (cost.width, cost.patches) == (encoder.num_features, 4)
    assert sizes.activation_bytes(2) == encoder.activation_bytes(2) < encoder.activation_bytes(4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("test_vit2", 32), ("test_efficientnet", 64), ("test_resnet", 64)])
def test_features_do_not_depend_on_the_batch(name: str, side: int) -> None:
    encoder, images = build(name, side).eval(), random_images(side, 3)
    torch.testing.assert_close(encoder(images[1:2]), encoder(images)[1:2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_images_are_resized_to_the_encoders_own_size() -> None:
    """In [-1, 1], bilinear and antialiased; uint8 and floating-point images alike."""
    encoder, images = build("test_vit", 96, image_size=32).eval(), random_images(96)
    resized = F.interpolate(images / 127.5 - 1, (32, 32), mode="bilinear", antialias=True)
    assert encoder.size == 32 and encoder(images).shape == (2, 4, 64)
    torch.testing.assert_close(encoder(images), encoder(resized), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(images / 127.5 - 1), encoder(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_stages_share_the_grid_of_the_first_one_listed() -> None:
    """Each normalized and resized, then concatenated in the order of the list and projected."""
    fine, coarse = (build("test_resnet", stages=(stage,)).eval() for stage in (2, 4))
    both = build("test_resnet", stages=(4, 2)).eval()
    assert (fine.grid, coarse.grid, both.grid) == ((8, 8), (2, 2), (2, 2))
    assert (fine.num_features, coarse.num_features, both.num_features) == (48, 96, 96)
    assert build("test_resnet", stages=(2, 4)).grid == (8, 8)
    images = random_images(64)
    x = fine.model.forward_intermediates(fine.normalize(images), indices=[2], intermediates_only=True)[0]
    x = F.interpolate(x, (2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    parts = torch.cat([coarse(images), F.layer_norm(x, [48], eps=1e-6)], dim=-1)
    assert isinstance(both.projection, torch.nn.Linear) and both(images).shape == (2, 4, 96)
    torch.testing.assert_close(both(images), both.projection(parts), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_stages_of_a_vit_are_its_blocks() -> None:
    """Normalized by the model's last norm; later blocks are removed."""
    whole, part = build("test_vit", 32).eval(), build("test_vit", 32, stages=(-1, 3)).eval()
    x = whole.model.forward_intermediates(whole.normalize(random_images(32)), indices=[3, 5], norm=True)[1]
    parts = torch.cat([stage.flatten(2).transpose(1, 2) for stage in reversed(x)], dim=-1)
    torch.testing.assert_close(part(random_images(32)), part.projection(parts), atol=1e-5, rtol=1e-4)
    assert len(build("test_vit", 32, stages=(3,)).model.blocks) == 4


def test_features_can_be_projected_to_any_width() -> None:
    encoder = build("test_efficientnet", out_width=40)
    assert encoder.num_features == 40 and encoder(random_images(64)).shape == (2, 4, 40)


def published(name: str, folder: Any, **config: Any) -> ImageEncoder:
    """An encoder with weights from a file."""
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model(name).state_dict(), folder / "weights.safetensors")
    return build(name, weights=str(folder / "weights.safetensors"), **config)


def statistics(encoder: ImageEncoder) -> torch.Tensor:
    return torch.cat([x.flatten() for name, x in encoder.named_buffers() if "running" in name]).clone()


def test_a_frozen_model_stays_as_it_is(tmp_path: Any) -> None:
    """Its projection learns."""
    encoder = published("test_efficientnet", tmp_path, frozen=True, out_width=8).train()
    assert not any(p.requires_grad for p in encoder.model.parameters())
    before, evaluated = statistics(encoder), encoder.eval()(random_images(64))
    found = encoder.train()(random_images(64))
    assert torch.equal(found, evaluated) and encoder.training and not encoder.model.training
    found.sum().backward()
    assert torch.equal(statistics(encoder), before)
    learns = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert learns == {"norms.0.weight", "norms.0.bias", "projection.weight", "projection.bias"}


def test_a_new_frozen_model_is_in_evaluation_mode(tmp_path: Any) -> None:
    """And with published weights that are trained, its batch norms are."""
    assert not published("test_efficientnet", tmp_path, frozen=True).model.training
    trained = published("test_efficientnet", tmp_path)
    assert trained.model.training and not trained.model.bn1.training


def test_a_frozen_plain_vit_keeps_its_class_token(tmp_path: Any) -> None:
    """A trained one loses it, as in UViM."""
    assert published("test_vit", tmp_path, frozen=True).model.cls_token is not None
    assert published("test_vit", tmp_path).model.cls_token is None


def test_statistics_of_published_batch_norms_do_not_change(tmp_path: Any) -> None:
    encoder = published("test_efficientnet", tmp_path).train()
    before = statistics(encoder)
    encoder(random_images(64)).sum().backward()
    assert torch.equal(statistics(encoder), before)
    assert encoder.model.bn1.weight.grad is not None
    fresh = build("test_efficientnet").train()
    before = statistics(fresh)
    fresh(random_images(64))
    assert not torch.equal(statistics(fresh), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_stochastic_depth_drops_branches_in_training_only(name: str) -> None:
    encoder, images = build(name, drop_path=0.5), random_images(64)
    assert not torch.equal(encoder.train()(images), encoder(images))
    assert torch.equal(encoder.eval()(images), encoder(images))


@torch.no_grad()
def test_models_with_stochastic_depth_of_their_own_have_none_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **keys: real(*names, drop_path_rate=0.5, **keys))
    encoder, images = build("test_vit", 32).train(), random_images(32)
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize(
    ("name", "changes", "plain"),
    [
        ("test_vit", {}, True),
        ("test_vit", {"reg_tokens": 1}, False),
        ("test_vit", {"init_values": 1e-5}, False),
        ("test_vit", {"global_pool": "map"}, False),
        ("test_resnet", {}, False),
    ],
)
def test_a_plain_vit_has_no_register_tokens_no_layer_scale_and_no_attention_pooling(
    name: str, changes: dict[str, Any], plain: bool
) -> None:
    assert timm_models.is_plain_vit(timm.create_model(name, **changes)) == plain


@pytest.mark.parametrize(("stride", "padding", "plain"), [(4, 0, True), (2, 0, False), (4, 1, False)])
def test_patches_are_a_matrix_product_unless_they_overlap(stride: int, padding: int, plain: bool) -> None:
    model = torch.nn.Module()
    model.patch_embed = torch.nn.Module()
    model.patch_embed.proj = torch.nn.Conv2d(3, 5, 4, stride, padding)
    timm_models._use_patch_linear(model)
    assert isinstance(model.patch_embed.proj, timm_models.PatchLinear) == plain


def test_the_patches_of_a_vit_are_a_matrix_product() -> None:
    assert isinstance(build("test_vit", 32).model.patch_embed.proj, timm_models.PatchLinear)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "unknown timm model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch"),
        ({"name": "resnet18.nobody"}, "name=resnet18.nobody: Invalid pretrained tag .*; choose one of resnet18"),
        ({"name": "test_vit", "image_size": 60}, r"model.encoder.image_size=60 is not divisible by 16, .* e.g. to 64"),
        ({"name": "test_resnet"}, r"data.image_size=80 is not divisible by 32, .* \(test_resnet\); set model.encoder"),
        ({"name": "test_resnet", "stages": (5,)}, r"stages=\[5\]: test_resnet has the stages 0 to 4"),
        ({"name": "test_resnet", "stages": (-6,)}, r"stages=\[-6\]: test_resnet has the stages 0 to 4"),
        ({"name": "test_resnet", "stages": (1, -4)}, "name each at most once"),
        ({"name": "test_resnet", "width": 64}, "timm model test_resnet has no model.encoder.width; remove it"),
        ({"name": "test_vit", "width": 65}, "test_vit cannot be built for 80 x 80 pixels .*divisible"),
        ({"name": "vgg11", "drop_path": 0.1}, "timm model vgg11 has no model.encoder.drop_path; remove it"),
        ({"name": "efficientformer_l1", "image_size": 64}, "efficientformer_l1 cannot take images of 64 x 64 pixels"),
    ],
)
def test_impossible_encoders_are_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_image_encoder(EncoderConfig(**config), 80)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_size_that_a_model_was_published_for_is_always_possible() -> None:
    """224 is no multiple of the stride of 64."""
    assert build("levit_128s", 224).grid == (4, 4)


def test_a_frozen_vit_without_class_token_is_counted_without_its_backward_pass() -> None:
    config = EncoderConfig("vit_base_patch16_siglip_gap_224", width=32, depth=1, num_heads=2, mlp_dim=64)
    trained, frozen = (build_image_encoder(replace(config, frozen=f), 32) for f in (False, True))
    assert trained.vit_size() is not None and frozen.cost().train == frozen.cost().forward
    assert frozen.activation_bytes(4) < trained.activation_bytes(4)
