"""Our LM with the reference's weights, imported, gives the reference's numbers and its greedy tokens."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.golden import golden_checkpoint
from tests.support.small import generate
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig
from uvim_fsq.interop.published import lm_rules, lm_shape, translate
from uvim_fsq.lm.autoregressive import AutoregressiveLM


def golden_lm() -> tuple[AutoregressiveLM, dict[str, np.ndarray]]:
    tensors, arrays = golden_checkpoint("lm.npz")
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", patch_size=8, width=32, depth=3, num_heads=4, mlp_dim=64, act_layer="gelu_tanh"
    )
    config = LMModelConfig(encoder=encoder, width=32, depth=3, num_heads=4, mlp_dim=64)
    lm = AutoregressiveLM(config, image_size=64, vocab_size=24, length=16).eval()
    state = translate(tensors, lm_rules(lm_shape(tensors, "lm.npz")), "lm.npz")
    lm.load_state_dict(state | {"mean": lm.mean, "std": lm.std}, strict=True)
    return lm, arrays


@torch.no_grad()
def test_teacher_forced_and_greedy_equal_the_reference() -> None:
    lm, arrays = golden_lm()
    image = torch.tensor(arrays["in/image"], dtype=torch.float32).permute(0, 3, 1, 2)
    memory = lm.encode(image)
    np.testing.assert_allclose(memory.numpy(), arrays["out/encoded"], atol=2e-4)
    # Their token 0 is the start symbol, which we keep outside the vocabulary.
    targets = torch.tensor(arrays["in/tokens"]).long() - 1
    assert int(targets.min()) >= 0
    logits = lm.decode(targets, memory)
    np.testing.assert_allclose(logits.numpy(), arrays["out/logits"][..., 1:], atol=2e-4)
    greedy = generate(lm, image)
    np.testing.assert_array_equal(greedy.numpy(), arrays["out/greedy"] - 1)
    logprobs = lm.decode(greedy, memory).log_softmax(-1).gather(-1, greedy[..., None])[..., 0]
    np.testing.assert_allclose(logprobs.numpy(), arrays["out/greedy_logprobs"], atol=2e-4)
