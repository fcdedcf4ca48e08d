"""The 8-bit keys and values of the cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.small import generate
from tests.support.token_models import make_images, make_lm
from uvim_fsq.lm.kv_cache import attend_int8, to_int8
from uvim_fsq.lm.token_generator import TokenGenerator


@torch.inference_mode()
def test_int8_cross_attention_is_close_to_full_precision() -> None:
    lm = make_lm()
    memory, tokens = lm.encode(make_images()), torch.randint(0, 11, (5, 9))
    full, small = lm.new_cache(memory), lm.new_cache(memory, int8=True)
    assert small.layers[0].cross_key.dtype == torch.int8
    for i in range(9):
        one, two = lm.decode_step(tokens[:, i : i + 1], full), lm.decode_step(tokens[:, i : i + 1], small)
        assert (one - two).norm() < 0.02 * one.norm()
        assert not torch.equal(one, two)
        for cache in (full, small):
            cache.position += 1
    generated = TokenGenerator(lm, int8=True)(make_images()).tokens
    assert (generated == generate(lm, make_images())).float().mean() > 0.8


def test_int8_attention_equals_attention_on_the_rounded_keys_and_values() -> None:
    query, key, value = (torch.randn(2, 3, n, 8) * torch.arange(1, 9) for n in (1, 7, 7))
    (small_key, key_scale), (small_value, value_scale) = to_int8(key), to_int8(value)
    assert (small_key * key_scale - key).abs().max() <= 0.51 * key_scale.max()
    expected = F.scaled_dot_product_attention(query, small_key * key_scale, small_value * value_scale)
    got = attend_int8(query, small_key, key_scale, small_value, value_scale)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
