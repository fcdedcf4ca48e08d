"""The image encoder of token models: any timm model, seen as a function from images to a grid of features.

It owns everything that belongs to the model's weights: its input size, mean and standard deviation, which of its stages
are used, and their projection. `timm_models` creates the models, `data.published_weights` finds their weights.

B batch, S side of the images, s side of the model's input, C channels of a stage, M = h w features, E their width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.data.published_weights import Triple
from uvim_fsq.errors import UserError, first_line
from uvim_fsq.layers import LN_EPS, init_transformer_, signed_pixels
from uvim_fsq.lm.timm_models import create_timm_model, is_plain_vit, is_vit
from uvim_fsq.performance.counting import forward_flops, meta_copy, saved_bytes
from uvim_fsq.performance.flops import EncoderCost, EncoderSize, vit_cost
from uvim_fsq.performance.memory import vit_activations


def build_image_encoder(config: EncoderConfig, image_size: int) -> ImageEncoder:
    """Builds the image encoder for images of side `image_size`, with the weights that the configuration names.

    Raises UserError for an unknown name, settings or stages that the model lacks, an image size that it cannot take,
    overrides of the architecture combined with weights, and weights that are missing or do not fit.
    """
    size = config.image_size or image_size
    model, mean, std = create_timm_model(config, size)
    return ImageEncoder(model, config, size, mean, std)


class ImageEncoder(nn.Module):
    """Images (B, 3, S, S), uint8 or floating point in [-1, 1] -> features (B, M, E), row by row.

    Class and register tokens are not among the features. A frozen model computes no gradient and stays in evaluation
    mode. The statistics of batch norms belong to published weights and do not change; without published weights, they
    are learned as usual, by each process from its own micro batches.

    Args:
        model: the timm model; layers that the chosen stages do not need are removed.
        config: which stages, their projection, whether the model is frozen.
        size: s. Images of other sizes are resized.
        mean: per channel, of images in [0, 1].
        std: likewise.

    Attributes:
        num_features: E.
        grid: (h, w).
        size: s.
        model: the timm model.

    Raises UserError for stages that the model lacks and an input size that it cannot take.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, config: EncoderConfig, size: int, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.config, self.size = config, size
        # Saved in the checkpoint, because they belong to the model's weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.model: Any = model
        stages = self._choose_stages()
        shapes = self._shapes()
        #: The place of each chosen stage in the model's order.
        self._order = [sorted(stages).index(stage) for stage in stages]
        shapes = [shapes[i] for i in self._order]
        channels, self.grid = [shape[0] for shape in shapes], shapes[0][1:]
        self.norms = nn.ModuleList(nn.Identity() if self._has_norm else nn.LayerNorm(c, eps=LN_EPS) for c in channels)
        self.num_features, self.projection = channels[0], nn.Identity()
        if config.out_width is not None or len(stages) > 1:
            self.num_features = config.out_width or max(channels)
            self.projection = nn.Linear(sum(channels), self.num_features)
            init_transformer_(self.projection)
        if config.frozen:
            self.model.requires_grad_(False)
        self.train()

    @property
    def num_patches(self) -> int:
        """M."""
        height, width = self.grid
        return height * width

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.normalize(image)
        with torch.no_grad() if self.config.frozen else contextlib.nullcontext():
            found = self._intermediates(self.model, x)
        stages = [norm(self._tokens(found[i])) for norm, i in zip(self.norms, self._order, strict=True)]
        return self.projection(torch.cat(stages, dim=-1) if len(stages) > 1 else stages[0])

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S), uint8 or floating point in [-1, 1] -> model input (B, 3, s, s) in the weights' dtype."""
        x = signed_pixels(image)
        if x.shape[-1] != self.size:
            x = _resize(x, (self.size, self.size))
        return (((x + 1) / 2 - self.mean) / self.std).to(self.mean.dtype)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode)
        if self.config.frozen:
            self.model.eval()
        elif self.config.weights != "none":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def depths(self) -> dict[nn.Parameter, int]:
        """The number of layers above each parameter of the timm model, from 0 for its last layer.

        What counts as a layer is up to timm: mostly blocks, with embeddings as a layer of their own and a final norm as
        part of the last block.

        Raises UserError for a model whose layers timm does not order.
        """
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            raise UserError(f"optim.encoder_layer_decay: timm does not order the layers of {self.config.name}; use 1")
        layers = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        # Tokens and positions precede the first block; timm 1.0.20 counts register tokens as the last layer.
        layers = {name: layer if "." in name else 0 for name, layer in layers.items()}
        ranks = {layer: depth for depth, layer in enumerate(sorted(set(layers.values()), reverse=True))}
        return {p: ranks[layers[name]] for name, p in self.model.named_parameters()}

    def cost(self) -> EncoderCost:
        """FLOP per image, and the size of the features."""
        vit = self.vit_size()
        if vit is not None:
            return vit_cost(vit)
        projection = 0.0
        if isinstance(self.projection, nn.Linear):
            projection = 2.0 * self.projection.in_features * self.projection.out_features * self.num_patches
        forward = forward_flops(self, (1, 3, self.size, self.size))
        # A frozen model has no backward pass, and the projection's input then needs no gradient.
        train = forward + projection if self.config.frozen else 3 * forward
        return EncoderCost(width=self.num_features, patches=self.num_patches, forward=forward, train=train)

    def activation_bytes(self, number_bytes: int) -> float:
        """Bytes per image kept for the backward pass, at `number_bytes` bytes per forward activation."""
        vit = self.vit_size()
        if vit is not None:
            return vit_activations(vit, number_bytes)
        return saved_bytes(self, (2, 3, self.size, self.size), bf16=number_bytes < 4) / 2

    def vit_size(self) -> EncoderSize | None:
        """The sizes of a plain ViT without class token that is trained and not projected; else None."""
        model = self.model
        if not is_plain_vit(model) or model.num_prefix_tokens or not isinstance(self.projection, nn.Identity):
            return None
        if self.config.frozen:
            return None  # it has no backward pass
        if hasattr(model.patch_embed, "backbone"):
            return None  # patches of a convolutional network's features
        blocks: list[Any] = list(model.blocks.children())
        return EncoderSize(
            width=model.embed_dim,
            depth=len(blocks),
            mlp_dim=blocks[0].mlp.fc1.out_features,
            patch_size=model.patch_embed.patch_size[0],
            patches=model.patch_embed.num_patches,
        )

    def _choose_stages(self) -> list[int]:
        """The indices of the chosen stages. Removes what they do not need from the model."""
        info: Any = self.model.feature_info
        reductions = [stage["reduction"] for stage in getattr(info, "info", info)]
        count, asked, name = len(reductions), self.config.stages or (-1,), self.config.name
        stages = [stage + count if stage < 0 else stage for stage in asked]
        if len(set(stages)) < len(stages) or not all(0 <= stage < count for stage in stages):
            raise UserError(
                f"model.encoder.stages={list(asked)}: {name} has the stages 0 to {count - 1}; name each at most once"
            )
        stride = max(reductions[stage] for stage in stages)
        if self.size % stride and self.size != self.model.pretrained_cfg["input_size"][-1]:
            key = "data.image_size" if self.config.image_size is None else "model.encoder.image_size"
            raise UserError(
                f"{key}={self.size} is not divisible by {stride}, the image encoder's patch size or stride ({name}); "
                f"set model.encoder.image_size, e.g. to {-(-self.size // stride) * stride}"
            )
        # The norm after the last block also fits the others if all blocks have one width and one grid.
        norm = getattr(self.model, "norm", None)
        self._has_norm = len(set(reductions)) == 1 and not isinstance(norm, (nn.Identity, type(None)))
        self._format = "NLC" if is_vit(self.model) else "NCHW"
        self._indices = self.model.prune_intermediate_layers(
            sorted(stages), prune_norm=not self._has_norm, prune_head=True
        )
        return stages

    def _intermediates(self, model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        """Model input (B, 3, s, s) -> the chosen stages in the model's order: (B, M, C) or (B, C, h, w)."""
        if self._format == "NCHW":
            x = x.contiguous(memory_format=torch.channels_last)  # depthwise convolutions on a CPU: 1.6 times as fast
        return model.forward_intermediates(
            x, indices=self._indices, norm=self._has_norm, output_fmt=self._format, intermediates_only=True
        )

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Features of one stage, as the model returns them -> (B, M, C), on the encoder's grid."""
        if x.ndim == 3:
            return x
        if x.shape[2:] != self.grid:
            x = _resize(x, self.grid).to(x.dtype)
        return x.flatten(2).transpose(1, 2)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of the chosen stages, in the model's order."""
        if self._format == "NLC":
            height, width = self.model.patch_embed.grid_size
            return [(self.model.embed_dim, height, width)] * len(self._indices)
        model: Any = meta_copy(self.model).eval().requires_grad_()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                stages = self._intermediates(model, torch.zeros(1, 3, self.size, self.size, device="meta"))
                torch.autograd.backward([stage.sum() for stage in stages])
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"timm model {self.config.name} cannot take images of {self.size} x {self.size} pixels "
                f"({first_line(error)}); set model.encoder.image_size"
            ) from error
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # DistributedDataParallel waits for every gradient
                self.model.get_parameter(name).requires_grad_(False)
        return [(stage.shape[1], stage.shape[2], stage.shape[3]) for stage in stages]


def _resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size) float32, bilinear, antialiased when downsampling."""
    # The antialiased kernel supports float32 on every device, but not bfloat16.
    return F.interpolate(x.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
