"""An equivalent image-to-token model from Hugging Face transformers: a ViT and an mBART decoder of the LM's sizes.

`VisionEncoderDecoderModel` is the library's model from images to tokens, and Donut combines it with mBART's decoder,
which is the closest to ours: pre-norm, learned positions, cross-attention, and `generate` can compile it. The
differences: projections have biases, the output projection has none, a norm follows the embedding, the start symbol is
a token, and the ViT has a class token. Only the benchmark depends on transformers, which is imported on the first call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from uvim_fsq.lm.autoregressive import AutoregressiveLM


def hugging_face_model(lm: AutoregressiveLM) -> Any:
    """An untrained `VisionEncoderDecoderModel` with the LM's depths, widths, heads, vocabulary, image size, device and
    dtype. Its start symbol is token V, one above the LM's vocabulary.
    """
    hf: Any = importlib.import_module("transformers")
    vit, config = lm.encoder.model, lm.config
    blocks: list[Any] = list(vit.blocks.children())
    block = blocks[0]
    activation = "gelu" if block.mlp.act.approximate == "none" else "gelu_pytorch_tanh"
    patch = vit.patch_embed.patch_size[0]
    encoder = hf.ViTConfig(
        hidden_size=vit.num_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=lm.encoder.size,
        patch_size=patch,
        hidden_act=activation,
    )
    decoder = hf.MBartConfig(
        vocab_size=lm.vocab_size + 1,
        max_position_embeddings=lm.length,
        d_model=config.width,
        decoder_layers=config.depth,
        decoder_attention_heads=config.num_heads,
        decoder_ffn_dim=config.mlp_dim,
        activation_function="gelu_pytorch_tanh",
        tie_word_embeddings=False,
        is_decoder=True,
        add_cross_attention=True,
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id"]),
    )
    pair = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    weight = lm.head.weight
    with torch.device(weight.device):
        model = hf.VisionEncoderDecoderModel(pair, encoder=hf.ViTModel(encoder, add_pooling_layer=False))
    return model.to(weight.dtype).eval()


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def hugging_face_decoders(
    lm: AutoregressiveLM, images: torch.Tensor, model: Any = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Greedy `generate` with the default cache and with a static one: `images` (B, 3, S, S) uint8 -> (B, L) int64.

    The static cache is allocated once and reset before each call, as in a server of fixed batch size. With
    `cache_implementation="static"`, each call would allocate a cache at new addresses, and CUDA graphs would have to be
    recorded again. With a static cache, `generate` compiles the decoding step on a GPU, never on a CPU.

    Args:
        model: result of `hugging_face_model`, to share it between batch sizes; None builds one.
    """
    hf: Any = importlib.import_module("transformers")
    model = hugging_face_model(lm) if model is None else model
    start = lm.vocab_size
    # Without an end symbol, generation never stops before L tokens.
    settings: dict[str, Any] = {"max_new_tokens": lm.length, "do_sample": False, "num_beams": 1}
    settings |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": start, "decoder_start_token_id": start}
    own, cross = (
        hf.StaticCache(config=model.config.decoder, max_cache_len=count)
        for count in (lm.length, lm.encoder.num_patches + 1)
    )
    cache = hf.EncoderDecoderCache(own, cross)

    def work(static: bool) -> torch.Tensor:
        pixels = lm.encoder.normalize(images)
        config, more = hf.GenerationConfig(**settings), {}
        if static:
            cache.reset()
            more["past_key_values"] = cache
            if images.is_cuda:
                # Each batch size gets its own graphs.
                config.compile_config = hf.CompileConfig(dynamic=False)
        tokens = model.generate(pixels, generation_config=config, **more)
        assert tokens.shape == (len(images), lm.length + 1), tokens.shape
        return tokens[:, 1:]

    compiled = ", compiled" if images.is_cuda else ""
    return {
        "Hugging Face, dynamic cache": functools.partial(work, False),
        f"Hugging Face, static cache{compiled}": functools.partial(work, True),
    }
