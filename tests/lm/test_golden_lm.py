"""The LM with imported reference weights gives the reference's logits and greedy tokens."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.golden_models import golden_lm
from tests.support.small import generate


@torch.no_grad()
def test_logits_and_greedy_tokens_equal_the_reference() -> None:
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
