"""Decoding: the cached loop equals the naive one, whatever the batch; weights load; names are checked."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from tests.support.compiler import needs_compiler
from tests.support.small import generate
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig
from uvim_fsq.errors import UserError
from uvim_fsq.lm import autoregressive as model
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.lm.kv_cache import attend_int8, to_int8
from uvim_fsq.lm.sampling import Sampling, example_uniforms, sample
from uvim_fsq.lm.token_generator import CACHE_BLOCK, TokenGenerator

SMALL = EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
CONFIG = LMModelConfig(encoder=SMALL, width=24, depth=2, num_heads=2, mlp_dim=32)


def make_lm(length: int = 9) -> AutoregressiveLM:
    torch.manual_seed(0)
    lm = AutoregressiveLM(CONFIG, image_size=32, vocab_size=11, length=length).eval()
    torch.nn.init.normal_(lm.head.weight)  # it starts at zero
    return lm


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@torch.no_grad()
def naive(
    lm: AutoregressiveLM, image: torch.Tensor, temperature: float, seeds: torch.Tensor, **filters: float
) -> torch.Tensor:
    """The specification: run the whole teacher-forced pass anew for every token."""
    memory = lm.encode(image)
    uniforms = example_uniforms(seeds, lm.length)
    tokens = torch.zeros(len(image), lm.length, dtype=torch.long)
    for i in range(lm.length):
        logits = lm.decode(tokens, memory)[:, i]
        if temperature == 0:
            tokens[:, i] = logits.argmax(-1)
        else:
            top_k, top_p = filters.get("top_k"), filters.get("top_p")
            k = int(top_k) if top_k is not None else None
            tokens[:, i] = sample(logits / temperature, uniforms[:, i : i + 1], k, top_p)[:, 0]
    return tokens


@torch.no_grad()
def test_floating_images_are_normalised_as_those_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' own mean and deviation (here ImageNet's, which DINOv2 has) hold for both."""
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    real = model.build_image_encoder
    monkeypatch.setattr(model, "build_image_encoder", lambda *arguments: (real(*arguments)[0], *imagenet))
    lm, batch = make_lm(), images()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in imagenet)
    torch.testing.assert_close(lm.normalize(batch), (batch.float() / 255 - mean) / std, atol=1e-5, rtol=0)
    floating = batch.float() / 127.5 - 1
    torch.testing.assert_close(lm.encode(floating), lm.encode(batch), atol=1e-5, rtol=0)
    assert torch.equal(TokenGenerator(lm)(floating), TokenGenerator(lm)(batch))


@pytest.mark.parametrize(("temperature", "filters"), [(0, {}), (1.0, {}), (0.7, {"top_k": 3}), (1.3, {"top_p": 0.6})])
def test_cached_equals_naive_and_no_batch_matters(temperature: float, filters: dict) -> None:
    lm, batch, seeds = make_lm(), images(), torch.tensor([3, 1, 4, 1, 5])
    cached = generate(lm, batch, temperature=temperature, seeds=seeds, **filters)
    assert torch.equal(cached, naive(lm, batch, temperature, seeds, **filters))
    alone = [
        generate(lm, batch[i : i + 1], temperature=temperature, seeds=seeds[i : i + 1], **filters) for i in range(5)
    ]
    assert torch.equal(cached, torch.cat(alone))
    assert int(cached.min()) >= 0 and int(cached.max()) < 11


@pytest.mark.parametrize("length", [CACHE_BLOCK - 1, CACHE_BLOCK, CACHE_BLOCK + 1, 2 * CACHE_BLOCK + 7])
def test_long_codes_equal_naive_decoding(length: int) -> None:
    """Steps that read the cache in part."""
    lm, batch = make_lm(length), images(2)
    seeds = torch.arange(2)
    assert torch.equal(generate(lm, batch, temperature=1.0, seeds=seeds), naive(lm, batch, 1.0, seeds))


@torch.no_grad()
@pytest.mark.parametrize("span", [None, 3])
def test_step_logits_equal_teacher_forced(span: int | None) -> None:
    lm, tokens = make_lm(), torch.randint(0, 11, (5, 9))
    memory = lm.encode(images())
    whole, cache = lm.decode(tokens, memory), lm.new_cache(memory)
    previous = torch.zeros(5, 1, dtype=torch.long)
    for i in range(span or 9):
        torch.testing.assert_close(lm.decode_step(previous, cache, span), whole[:, i], atol=1e-5, rtol=1e-4)
        cache.position += 1
        previous = tokens[:, i : i + 1]


def test_a_decoder_is_used_again() -> None:
    lm, first, second = make_lm(), images(), images().flip(0)
    decoder = TokenGenerator(lm)
    assert torch.equal(decoder(first), generate(lm, first)) and torch.equal(decoder(second), generate(lm, second))
    assert torch.equal(decoder(first[:2]), generate(lm, first[:2])) and torch.equal(decoder(first), generate(lm, first))
    assert list(decoder._buffers) == [5]  # sizes near each other do not add up
    torch.nn.init.normal_(lm.blocks[0].self_attn.value.weight)
    assert torch.equal(decoder(first), naive(lm, first, 0.0, torch.arange(5)))  # the weights of the moment


def test_a_decoder_is_gone_when_nobody_holds_it() -> None:
    """Its buffers are gigabytes; they cannot wait for the search for cycles."""
    decoder = TokenGenerator(make_lm())
    decoder(images())
    left = weakref.ref(decoder)
    del decoder
    assert left() is None


@torch.inference_mode()
def test_int8_memory_is_close_to_full() -> None:
    lm = make_lm()
    memory, tokens = lm.encode(images()), torch.randint(0, 11, (5, 9))
    full, small = lm.new_cache(memory), lm.new_cache(memory, int8=True)
    assert small.layers[0].cross_key.dtype == torch.int8
    lm.refill_cache(small, memory.flip(0))
    lm.refill_cache(small, memory)
    for i in range(9):
        one, two = lm.decode_step(tokens[:, i : i + 1], full), lm.decode_step(tokens[:, i : i + 1], small)
        assert (one - two).norm() < 0.02 * one.norm()
        assert not torch.equal(one, two)
        for cache in (full, small):
            cache.position += 1
    decoded = TokenGenerator(lm, int8=True)(images())
    assert (decoded == generate(lm, images())).float().mean() > 0.8


def test_int8_attention_is_that_of_its_rounded_numbers() -> None:
    query, key, value = (torch.randn(2, 3, n, 8) * torch.arange(1, 9) for n in (1, 7, 7))
    (small_key, key_scale), (small_value, value_scale) = to_int8(key), to_int8(value)
    assert (small_key * key_scale - key).abs().max() <= 0.51 * key_scale.max()
    expected = F.scaled_dot_product_attention(query, small_key * key_scale, small_value * value_scale)
    got = attend_int8(query, small_key, key_scale, small_value, value_scale)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_bf16_decoding_leaves_the_model_alone() -> None:
    lm = make_lm()
    decoder = TokenGenerator(lm, precision="bf16")
    assert lm.blocks[0].mlp.fc1.weight.dtype == torch.float32
    tokens = decoder(images())
    assert tokens.shape == (5, 9) and (tokens == generate(lm, images())).float().mean() > 0.6


@pytest.mark.slow
@needs_compiler
def test_a_compiled_step_decodes_as_the_plain_one() -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5), images()
    decoder = TokenGenerator(lm, Sampling(1.0, top_k=5), compile=True)
    assert torch.equal(decoder(batch), generate(lm, batch, temperature=1.0, top_k=5))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="compilation needs a C\\+\\+ compiler"):
        TokenGenerator(make_lm(), compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_decodes_as_the_plain_one(compile: bool, temperature: float) -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5).cuda(), images().cuda()
    plain = naive(lm.cpu(), batch.cpu(), temperature, torch.arange(5))
    decoder = TokenGenerator(lm.cuda(), Sampling(temperature), compile=compile)
    for count in (5, 3, 5):  # the smaller batch is padded
        assert torch.equal(decoder(batch[:count]).cpu(), plain[:count])
    assert len(decoder._buffers) == 1


@torch.no_grad()
def test_causal() -> None:
    lm, tokens = make_lm(), torch.randint(0, 11, (5, 9))
    memory, changed = lm.encode(images()), tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    one, two = lm.decode(tokens, memory), lm.decode(changed, memory)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:])


def test_filters() -> None:
    lm, batch = make_lm(), images()
    assert torch.equal(generate(lm, batch, temperature=1.0, top_k=1), generate(lm, batch))
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2, 0.0]]))
    for u in (0.0, 0.4999, 0.51, 0.9999999):
        uniform = torch.tensor([[u]], dtype=torch.float64)
        assert int(sample(logits, uniform, None, None)) < 3
        assert int(sample(logits, uniform, None, 0.5)) == 0
        assert int(sample(logits, uniform, 2, None)) < 2
    for bad in ({"top_k": 2, "top_p": 0.5}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(UserError):
            generate(lm, batch, **{"temperature": 1.0, **bad})


def test_sampling_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(20000, 3)
    drawn = sample(
        logits, torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None, None
    )
    shares = torch.bincount(drawn[:, 0], minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_published_weights_from_a_file(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    published = timm.create_model(name, num_classes=1000)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    encoder, mean, std = build_image_encoder(EncoderConfig(name=name, weights=str(file)), 64)
    assert mean == tuple(published.pretrained_cfg["mean"]) and std == tuple(published.pretrained_cfg["std"])
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)
    assert encoder.pos_embed.shape == (1, 16, 192) and encoder.cls_token is None
    assert encoder.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 192)
    safetensors.torch.save_file({"nothing": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="its arrays belong to a different model"):
        build_image_encoder(EncoderConfig(name=name, weights=str(file)), 64)
    with pytest.raises(UserError, match="needs the architecture as published; remove model.encoder.width$"):
        build_image_encoder(EncoderConfig(name=name, weights=str(file), width=64), 64)
    with pytest.raises(UserError, match="no such file"):
        build_image_encoder(EncoderConfig(name=name, weights=str(tmp_path / "none.npz")), 64)


def vit_npz(state: dict[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A timm ViT's weights under the names and in the layouts of the public ImageNet-21k .npz files."""
    size = state["norm.weight"].numel()
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for k, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{k}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{k}/bias"] = state[f"{ours}{norm}.bias"]
        for k, part in enumerate(("query", "key", "value")):
            weight, bias = (state[f"{ours}attn.qkv.{kind}"].chunk(3)[k] for kind in ("weight", "bias"))
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(size, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, size)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for k in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/kernel"] = state[f"{ours}mlp.fc{k + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/bias"] = state[f"{ours}mlp.fc{k + 1}.bias"]
    return {name: value.detach().numpy() for name, value in arrays.items()}


def test_public_vit_npz(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    published = timm.create_model(name)
    np.savez(tmp_path / "vit.npz", **vit_npz(published.state_dict(), heads=3))
    encoder, mean, std = build_image_encoder(EncoderConfig(name=name, weights=str(tmp_path / "vit.npz")), 224)
    assert mean == std == (0.5, 0.5, 0.5)
    found, expected = encoder.state_dict(), published.state_dict()
    assert torch.equal(found.pop("pos_embed"), expected["pos_embed"][:, 1:])
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_encoder_names_and_sizes() -> None:
    with pytest.raises(UserError, match="did you mean"):
        build_image_encoder(EncoderConfig(name="vit_tinny_patch16_224"), 64)
    with pytest.raises(UserError, match="not divisible"):
        build_image_encoder(EncoderConfig(name="vit_tiny_patch16_224"), 60)
    with pytest.raises(UserError, match="not a vision transformer"):
        build_image_encoder(EncoderConfig(name="resnet18"), 64)
