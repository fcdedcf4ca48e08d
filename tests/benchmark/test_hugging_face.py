"""The Hugging Face model of equal size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.benchmark import TINY, by_name, small_sizes, tiny_lm
from tests.support.paths import ROOT
from uvim_fsq.benchmark import hugging_face, side_by_side
from uvim_fsq.config.schema import LMRun
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.tasks.configuration import load_run

CPU = torch.device("cpu")


def test_the_other_model_has_the_sizes_of_ours() -> None:
    """Also with a decoder that is narrower than its encoder."""
    pytest.importorskip("transformers")
    lm = tiny_lm(replace(TINY, width=8, depth=2))
    model: Any = hugging_face.hugging_face_model(lm)
    encoder, decoder = model.config.encoder, model.config.decoder
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.intermediate_size) == (16, 1, 32)
    assert (encoder.num_attention_heads, encoder.patch_size, encoder.image_size) == (2, 4, 16)
    assert encoder.hidden_act == decoder.activation_function == "gelu_pytorch_tanh"
    assert (decoder.d_model, decoder.decoder_layers, decoder.decoder_attention_heads) == (8, 2, 2)
    assert (decoder.decoder_ffn_dim, decoder.vocab_size, decoder.max_position_embeddings) == (32, 26, 4)
    assert model.enc_to_dec_proj.in_features == 16 and not model.training
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert all(decoder().shape == (2, 4) for decoder in side_by_side.alternative_decoders(lm, images, model).values())


def test_hugging_face_decodes_all_tokens() -> None:
    pytest.importorskip("transformers")
    lm, images = tiny_lm(), torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    decoders = side_by_side.alternative_decoders(lm, images)
    assert list(decoders) == ["naive loop", "Hugging Face, dynamic cache", "Hugging Face, static cache"]
    tokens = {name: decoder() for name, decoder in decoders.items()}
    assert all(one.shape == (3, 4) and one.dtype == torch.int64 for one in tokens.values())
    # The emptied cache of the second call gives what a new one gives.
    torch.testing.assert_close(decoders["Hugging Face, static cache"](), tokens["Hugging Face, dynamic cache"])
    torch.testing.assert_close(tokens["Hugging Face, static cache"], tokens["Hugging Face, dynamic cache"])


def test_hugging_face_static_cache_sees_the_image() -> None:
    """Other images after the first call: the cross-attention's keys and values are computed anew."""
    pytest.importorskip("transformers")
    lm = tiny_lm()
    model: Any = hugging_face.hugging_face_model(lm)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    decoders = hugging_face.hugging_face_decoders(lm, images, model)
    first = decoders["Hugging Face, static cache"]()
    images.copy_(255 - images)
    second = decoders["Hugging Face, static cache"]()
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, decoders["Hugging Face, dynamic cache"]())


@pytest.mark.parametrize("file", ["small_lm", "quickstart_gpu_lm", "lm"])
def test_hugging_face_is_of_equal_size(file: str) -> None:
    pytest.importorskip("transformers")
    run = load_run(ROOT / f"configs/nyu_depth/{file}.yaml", ["model.encoder.weights=none"])
    assert isinstance(run, LMRun)
    large = file == "lm"
    with torch.device("meta"):
        lm = AutoregressiveLM(
            run.model, image_size=512 if large else 32, vocab_size=4096 if large else 64, length=256 if large else 16
        )
    ours, theirs = (hugging_face.parameter_count(m) for m in (lm, hugging_face.hugging_face_model(lm)))
    assert theirs == pytest.approx(ours, rel=0.01)


def test_hugging_face_compared_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (8, 4))
    sizes = small_sizes()
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    for batch in (1, 32):
        ours = lines[f"decoding, batch {batch}, ours"]
        theirs = lines[f"decoding, batch {batch}, Hugging Face, static cache"]
        assert theirs.other["time / ours"] == pytest.approx(ours.value / theirs.value)
        assert ours.other["Hugging Face parameters"] > 1000
