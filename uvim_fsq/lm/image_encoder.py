"""The LM's image encoder: any plain ViT of timm without its class token, optionally with published weights.

B batch, S image side, p patch side, D width.
"""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.data.arrays import check_npz
from uvim_fsq.errors import UserError

# timm takes seconds to import, because it imports torchvision and the compiler.
if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

HALF = (0.5, 0.5, 0.5)
OVERRIDES = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "num_heads": "num_heads"}


class GELUTanh(nn.GELU):
    """GELU in the tanh approximation, as in the UViM reference code. timm passes an `inplace` argument."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(approximate="tanh")


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


#: timm's modules that define plain ViTs and ViTs with a small CNN stem.
VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
ACTIVATIONS: dict[str, Any] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh}

Triple = tuple[float, float, float]


def build_image_encoder(config: EncoderConfig, image_size: int) -> tuple[VisionTransformer, Triple, Triple]:
    """Builds a timm ViT without class token. Its `forward_features` maps images (B, 3, S, S) to (B, patches, width).

    Returns the encoder, and the per-channel mean and standard deviation that its weights expect of images in [0, 1].

    Raises UserError for an unknown name, a model that is not a plain ViT, an image size that is not a multiple of the
    patch size, architecture overrides combined with weights, and weights that do not fit.
    """
    import timm

    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models("*vit*"), n=3)
        raise UserError(
            f"unknown timm model {config.name!r}; did you mean {', '.join(close) or 'vit_base_patch16_224'}?"
        )
    overrides: dict[str, Any] = {
        theirs: getattr(config, ours) for ours, theirs in OVERRIDES.items() if getattr(config, ours) is not None
    }
    given = [f"model.encoder.{key}" for key in (*OVERRIDES, "mlp_dim") if getattr(config, key) is not None]
    if config.weights != "none" and given:
        raise UserError(
            f"model.encoder.weights={config.weights} needs the architecture as published; remove {', '.join(given)}"
        )
    if config.mlp_dim is not None:
        width: Any = config.width or timm.create_model(config.name, num_classes=0).num_features
        overrides["mlp_ratio"] = config.mlp_dim / int(width)
    if config.act_layer != "default":
        overrides["act_layer"] = ACTIVATIONS[config.act_layer]
    encoder = _create(config.name, image_size, overrides)
    if config.weights == "none":
        return encoder, HALF, HALF
    mean, std = _load_published(encoder, config)
    return encoder, mean, std


def _create(name: str, image_size: int, overrides: dict[str, Any]) -> VisionTransformer:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    arguments: dict[str, Any] = dict(
        num_classes=0, class_token=False, global_pool="", img_size=image_size, dynamic_img_size=True, **overrides
    )
    try:
        encoder = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError) as error:
        if not timm.models.is_model_in_modules(name, VIT_MODULES):
            raise _not_a_vit(name) from error
        raise UserError(f"timm model {name!r} cannot be the image encoder ({error}); choose a plain ViT") from error
    if not isinstance(encoder, VisionTransformer):
        raise _not_a_vit(name)
    patch, conv = encoder.patch_embed.patch_size[0], encoder.patch_embed.proj
    if image_size % patch:
        raise UserError(
            f"data.image_size={image_size} is not divisible by the image encoder's patch size {patch} ({name})"
        )
    if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride and conv.padding == (0, 0):
        encoder.patch_embed.proj = PatchLinear(conv)
    return encoder


def _not_a_vit(name: str) -> UserError:
    import timm

    kind = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return UserError(
        f"model.encoder.name={name} is not a vision transformer (timm's {kind}), as the image encoder must be; "
        "choose e.g. vit_base_patch16_224"
    )


def _load_published(encoder: VisionTransformer, config: EncoderConfig) -> tuple[Triple, Triple]:
    """Loads the published weights without class token, prefix positions and head; returns their mean and deviation."""
    import timm
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    arguments: dict[str, Any] = {"pretrained": True}
    if config.weights != "hub":
        file = Path(config.weights)
        if not file.is_file():
            raise UserError(f"model.encoder.weights={file}: no such file; give none, hub or a local weights file")
        if file.suffix == ".npz":
            _check_npz(file)
        # `custom_load` selects timm's loader for the .npz files in which ViTs were first published.
        arguments["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": file.suffix == ".npz"}
    try:
        published = timm.create_model(config.name, **arguments)
    except Exception as error:  # timm, the hub client and three file formats raise many types
        raise UserError(_describe_load_error(config, error)) from error
    assert isinstance(published, VisionTransformer)
    state: dict[str, Any] = {
        name: value for name, value in published.state_dict().items() if not name.startswith(("head", "cls_token"))
    }
    prefix, grid = published.num_prefix_tokens, encoder.patch_embed.grid_size
    assert grid is not None
    resample: Any = resample_abs_pos_embed
    state["pos_embed"] = resample(state["pos_embed"][:, prefix:], list(grid), num_prefix_tokens=0)
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"weights of {config.name} do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    cfg: Any = published.pretrained_cfg
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return mean, std


def _check_npz(file: Path) -> None:
    try:
        check_npz(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.encoder.weights={file} is truncated or not an .npz file ({error}); download it again"
        ) from error


def _describe_load_error(config: EncoderConfig, error: Exception) -> str:
    """One line for an error raised by timm, the hub client or a file reader."""
    cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    if config.weights == "hub":
        return (
            f"model.encoder.weights=hub: the published weights of {config.name} are not on this machine and cannot be "
            f"fetched ({cause}); go online once, or give the path of a file with them, or weights=none"
        )
    if "loading state_dict" in cause or isinstance(error, KeyError):
        cause = "its arrays belong to a different model"
    elif "weights_only" in cause:
        cause = "it contains pickled Python objects, which are never loaded; save it as .safetensors"
    return (
        f"model.encoder.weights={config.weights} does not contain weights of model.encoder.name={config.name} "
        f"({cause}); give the file that belongs to this name"
    )
