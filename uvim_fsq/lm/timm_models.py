"""Creates the timm models that serve as image encoders: names, overrides, input sizes, class tokens.

B batch, S side of the model's images, p patch side, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.overrides import TorchFunctionMode

from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.data.published_weights import HALF, Triple, check_package, create_published
from uvim_fsq.errors import UserError, first_line
from uvim_fsq.layers import gelu

# timm takes long to import: all of its models, and torchvision.
if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

#: Our key -> timm's argument.
OVERRIDES = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "num_heads": "num_heads"}

#: Methods of tensors, and functions of torch.nn.init, by which models are initialized.
FILLS = ("uniform_", "normal_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_")


class GELUTanh(nn.GELU):
    """GELU in the tanh approximation, as in the UViM reference code. timm passes an `inplace` argument."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return gelu(input)


class PatchLinear(nn.Module):
    """A patch convolution computed as reshape and linear, which is faster. It reuses the convolution's parameters."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.kernel_size = conv.weight, conv.bias, conv.kernel_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, D, S / p, S / p)."""
        p, q = self.kernel_size
        patches = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=p, q=q)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


ACTIVATIONS: dict[str, Any] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh}


def create_timm_model(config: EncoderConfig, size: int) -> tuple[nn.Module, Triple, Triple]:
    """Creates the model that the configuration names, for images (B, 3, size, size), with its weights.

    A plain ViT that is trained loses its class token, as in UViM. All others stay as they were published, because their
    weights rely on their class and register tokens.

    Returns the model, and the per-channel mean and standard deviation that it expects of images in [0, 1].

    Raises UserError for an unknown name, settings that the model lacks, an image size that it cannot take, overrides of
    the architecture combined with weights, and weights that do not fit.
    """
    with compiler_unloaded():
        import timm

    published = _on_meta(config.name)
    arguments = _arguments(config, published)
    if config.weights == "package":
        check_package(config.name)
    if getattr(published, "dynamic_img_size", False):
        # All images have one size. For any other, DINOv3 makes its rotary positions on the host, for each batch.
        arguments["dynamic_img_size"] = False
    mean, std = HALF, HALF
    if is_plain_vit(published) and not config.frozen:
        arguments |= {"num_classes": 0, "class_token": False, "global_pool": ""}
        model = _sized(config, size, partial(timm.create_model, config.name), arguments)
        if config.weights != "none":
            mean, std = _load_without_class_token(model, config)
    elif config.weights == "none":
        model = _sized(config, size, partial(timm.create_model, config.name), arguments)
    else:
        make = partial(create_published, config.name, config.weights)
        model, mean, std = _sized(config, size, make, arguments)
    _use_patch_linear(model)
    if config.drop_path == 0:
        _remove_drop_path(model)
    return model, mean, std


def is_vit(model: nn.Module) -> bool:
    """Whether a timm model is a sequence of equal blocks over patches: `VisionTransformer` or `Eva` (DINOv3, EVA)."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, (VisionTransformer, Eva))


def is_plain_vit(model: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether a timm model is a ViT as in UViM: at most a class token, no register tokens, no LayerScale (DINOv2)."""
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        return False
    scaled = any(name.endswith("ls1.gamma") for name, _ in model.named_parameters())
    return model.num_reg_tokens == 0 and not scaled and model.attn_pool is None


def _on_meta(name: str) -> nn.Module:
    """The named model as timm publishes it, without memory for its weights."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"unknown timm model {name!r}; did you mean {', '.join(close) or 'vit_base_patch16_224'}?")
    try:
        with torch.device("meta"), _WithoutValues():
            return timm.create_model(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UserError(
            f"model.encoder.name={name}: {first_line(error)}; choose one of {', '.join(known) or 'timm.list_models()'}"
        ) from error


class _WithoutValues(TorchFunctionMode):
    """Skips what only changes values. On the meta device there are none, but some of it imports torch's tracing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            return args[0] if args else kwargs["tensor"]  # torch.nn.init passes it by name
        return func(*args, **kwargs)


def _arguments(config: EncoderConfig, published: nn.Module) -> dict[str, Any]:
    """timm's arguments for the architecture and for stochastic depth."""
    arguments = {
        theirs: getattr(config, ours) for ours, theirs in OVERRIDES.items() if getattr(config, ours) is not None
    }
    given = [f"model.encoder.{key}" for key in (*OVERRIDES, "mlp_dim") if getattr(config, key) is not None]
    if config.weights != "none" and given:
        raise UserError(
            f"model.encoder.weights={config.weights} needs the architecture as published; remove {', '.join(given)}"
        )
    if config.mlp_dim is not None:
        width: Any = config.width or published.num_features
        arguments["mlp_ratio"] = config.mlp_dim / int(width)
    if config.act_layer != "default":
        arguments["act_layer"] = ACTIVATIONS[config.act_layer]
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    return arguments


#: timm's argument -> the key that sets it.
_KEYS = {theirs: ours for ours, theirs in OVERRIDES.items()} | {
    "mlp_ratio": "mlp_dim",
    "drop_path_rate": "drop_path",
    "act_layer": "act_layer",
}


def _sized(config: EncoderConfig, size: int, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls `make` with the image size as one more argument, which models that take any size do not have."""
    try:
        try:
            return make(**arguments, img_size=size)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return make(**arguments)
    except TypeError as error:
        keys = [f"model.encoder.{key}" for theirs, key in _KEYS.items() if f"'{theirs}'" in str(error)]
        what = f"has no {', '.join(keys)}; remove it" if keys else f"cannot be built ({first_line(error)})"
        raise UserError(f"timm model {config.name} {what}") from error
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"timm model {config.name} cannot be built for {size} x {size} pixels ({first_line(error)}); set "
            "model.encoder.image_size to a size that it takes, or change the other keys of model.encoder"
        ) from error


def _use_patch_linear(model: nn.Module) -> None:
    embed: Any = getattr(model, "patch_embed", None)
    conv = getattr(embed, "proj", None)
    if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride and conv.padding == (0, 0):
        embed.proj = PatchLinear(conv)


def _remove_drop_path(model: nn.Module) -> None:
    from timm.layers.drop import DropPath

    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0


def _load_without_class_token(model: VisionTransformer, config: EncoderConfig) -> tuple[Triple, Triple]:
    """Loads the published weights without class token, prefix positions and head; returns their mean and deviation."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    published, mean, std = create_published(config.name, config.weights)
    assert is_plain_vit(published)
    state: dict[str, Any] = {
        name: value for name, value in published.state_dict().items() if not name.startswith(("head", "cls_token"))
    }
    prefix, grid = 0 if published.no_embed_class else published.num_prefix_tokens, model.patch_embed.grid_size
    assert grid is not None
    resample: Any = resample_abs_pos_embed
    state["pos_embed"] = resample(state["pos_embed"][:, prefix:], list(grid), num_prefix_tokens=0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"weights of {config.name} do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return mean, std
