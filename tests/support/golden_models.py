"""Models with the weights of golden files. Only files named test_golden_*.py import this module."""

from __future__ import annotations

import numpy as np

from tests.support.golden import golden_checkpoint
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OracleModelConfig, QuantizerConfig
from uvim_fsq.interop.published import lm_rules, lm_shape, oracle_rules, oracle_shape, translate
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Categorical, LabelChannel, Real

#: Golden file -> label channels of its oracle.
ORACLES: dict[str, dict[str, LabelChannel]] = {
    "oracle_vq_depth": {"depth": Categorical(8)},
    "oracle_vq_depth_noctx": {"depth": Categorical(8)},
    "oracle_vq_panoptic": {"semantics": Categorical(5), "instances": Categorical(4)},
    "oracle_vq_color": {"color": Real(3)},
}


def golden_oracle(name: str) -> tuple[Oracle, dict[str, np.ndarray]]:
    """The oracle of a golden file, and the file's other arrays."""
    tensors, arrays = golden_checkpoint(f"{name}.npz")
    shape = oracle_shape(tensors, name)
    assert shape.context == ("none" if "noctx" in name else "both")
    config = OracleModelConfig(
        patch_size=shape.patch_size,
        width=shape.width,
        encoder_depth=shape.encoder_depth,
        decoder_depth=shape.decoder_depth,
        num_heads=shape.num_heads,
        mlp_dim=shape.mlp_dim,
        code_length=16,
        context=shape.context,
        quantizer=QuantizerConfig(kind="vq", codebook_size=shape.codebook_size, codeword_dim=shape.codeword_dim),
    )
    oracle = Oracle(config, ORACLES[name], 64).eval()
    real = {channel: isinstance(kind, Real) for channel, kind in ORACLES[name].items()}
    oracle.load_state_dict(translate(tensors, oracle_rules(shape, real), name), strict=True)
    return oracle, arrays


def golden_lm() -> tuple[AutoregressiveLM, dict[str, np.ndarray]]:
    """The LM of lm.npz, and the file's other arrays."""
    tensors, arrays = golden_checkpoint("lm.npz")
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", patch_size=8, width=32, depth=3, num_heads=4, mlp_dim=64, act_layer="gelu_tanh"
    )
    config = LMModelConfig(encoder=encoder, width=32, depth=3, num_heads=4, mlp_dim=64)
    lm = AutoregressiveLM(config, image_size=64, vocab_size=24, length=16).eval()
    state = translate(tensors, lm_rules(lm_shape(tensors, "lm.npz")), "lm.npz")
    lm.load_state_dict(state | {"encoder.mean": lm.encoder.mean, "encoder.std": lm.encoder.std}, strict=True)
    return lm, arrays
