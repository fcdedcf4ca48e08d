"""Published UViM checkpoints: small ones through to prediction, full sizes by shape, and files that do not fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.golden import golden, golden_checkpoint, golden_path
from tests.support.small import LM as SMALL_LM
from tests.support.small import generate
from uvim_fsq.checkpoints.loading import load_checkpoint, resolve
from uvim_fsq.cli import main
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OracleModelConfig, QuantizerConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.interop.import_uvim import import_lm, import_oracle
from uvim_fsq.interop.published import lm_rules, lm_shape, oracle_rules, oracle_shape, read_npz, translate
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Categorical, LabelChannel, Real
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.run import train

FULL: dict[str, dict[str, LabelChannel]] = {
    "depth_stageI": {"depth": Categorical(256)},
    "panoptic_stageI": {"semantics": Categorical(134), "instances": Categorical(100)},
    "color_stageI": {"color": Real(3)},
}


def published(path: Path, name: str, **changes: np.ndarray | None) -> Path:
    """A golden file's checkpoint alone, as it would be published; `changes` replace arrays, None removes them."""
    arrays: dict[str, Any] = {k: v for k, v in golden(name).items() if k.startswith(("params/", "state/"))}
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    base = tmp_path_factory.mktemp("imported")
    import_oracle(
        published(base / "oracle.npz", "oracle_vq_depth.npz"),
        "depth",
        base / "oracle",
        [f"data.root={data}", "task.protocol=full", "eval.batch_size=4", "eval.workers=0", "data.workers=0"],
    )
    import_lm(published(base / "lm.npz", "lm.npz"), base / "oracle", base / "lm", ["eval.batch_size=4"])
    return base


def test_an_imported_lm_gives_the_references_numbers(imported: Path) -> None:
    loaded = load_checkpoint(imported / "lm")
    arrays = golden_checkpoint("oracle_vq_depth.npz")[1]
    codes = loaded.oracle.quantizer.indices_to_codes(torch.tensor(arrays["in/random_code"]).long())
    image = torch.tensor(arrays["in/ctx"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = loaded.oracle.label_head(loaded.oracle.decode_hidden(codes, image))["depth"]
        np.testing.assert_allclose(logits.transpose(2, 3).numpy(), arrays["out/decode_logits_depth"], atol=2e-4)
        given = golden_checkpoint("lm.npz")[1]
        assert loaded.lm is not None
        tokens = generate(loaded.lm, torch.tensor(given["in/image"], dtype=torch.float32).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(tokens.numpy(), given["out/greedy"] - 1)


@pytest.mark.slow
def test_imported_runs_evaluate_predict_and_train_a_new_lm(imported: Path, tmp_path: Path, data: Path) -> None:
    result = evaluate(imported / "lm")
    assert result["protocol"] == "nyu_depth/full" and np.isfinite(result["figures"]["lm"]["rmse"])
    prediction = Predictor.from_run(imported / "lm").predict(np.zeros((30, 40, 3), np.uint8))
    assert prediction.shape == (30, 40)
    new = train(resolve(load_run(SMALL_LM, [f"oracle={imported / 'oracle'}", f"train.out={tmp_path / 'new'}"])))
    assert json.loads((new / "evaluation.json").read_text())["images"] == 6
    with pytest.raises(UserError, match="was imported, so its training cannot be resumed"):
        config = imported / "oracle" / "config.yaml"
        train(resolve(load_run(config, ["train.resume=auto", "train.batch_size=8", "optim.warmup_steps=0"])))


def test_the_command_imports_a_run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = published(tmp_path / "color.npz", "oracle_vq_color.npz")
    main(["import-uvim", str(file), "--task", "color", "--out", str(tmp_path / "color")])
    assert "imported: " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "color").task.name == "imagenet_color"
    for arguments, message in (
        ((str(file), "--out", str(tmp_path / "x")), "needs --task"),
        ((str(file), "--stage", "lm", "--out", str(tmp_path / "x")), "needs --oracle"),
        ((str(file), "--oracle", "o", "--task", "color", "--out", str(tmp_path / "x")), "--oracle has no meaning"),
        ((str(file), "--stage", "lm", "--task", "color", "--out", str(tmp_path / "x")), "--task has no meaning"),
        ((str(file), "--task", "color", "--out", str(tmp_path / "color")), "already holds checkpoints"),
    ):
        with pytest.raises(SystemExit):
            main(["import-uvim", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_full_size_oracles_fit_by_name_and_shape(kind: str) -> None:
    tensors = full_size(kind)
    shape = oracle_shape(tensors, kind)
    config = OracleModelConfig(
        quantizer=QuantizerConfig(kind="vq", codebook_size=shape.codebook_size, codeword_dim=shape.codeword_dim)
    )
    with torch.device("meta"):
        oracle = Oracle(config, FULL[kind], 512)
    rules = oracle_rules(shape, {name: isinstance(channel, Real) for name, channel in FULL[kind].items()})
    assert_same_shapes(translate(tensors, rules, kind), oracle.state_dict())


def test_full_size_lm_fits_by_name_and_shape() -> None:
    tensors = full_size("stageII")
    shape = lm_shape(tensors, "stageII")
    assert asdict(shape) == {
        "patch_size": 16, "encoder_width": 1024, "encoder_depth": 24, "encoder_heads": 16, "encoder_mlp": 4096,
        "num_patches": 1024, "width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096, "length": 256, "codes": 4096,
    }  # fmt: skip
    config = LMModelConfig(encoder=EncoderConfig(name="vit_large_patch16_224", act_layer="gelu_tanh"))
    with torch.device("meta"):
        lm = AutoregressiveLM(config, image_size=512, vocab_size=4096, length=256)
    expected = {name: value for name, value in lm.state_dict().items() if name not in ("encoder.mean", "encoder.std")}
    assert_same_shapes(translate(tensors, lm_rules(shape), "stageII"), expected)


def full_size(kind: str) -> dict[str, torch.Tensor]:
    shapes = json.loads(golden_path("uvim_checkpoint_shapes.json").read_text())[kind]
    return {name.removeprefix("params/"): torch.empty(shape, device="meta") for name, shape in shapes.items()}


def assert_same_shapes(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert {name: tuple(x.shape) for name, x in found.items()} == {n: tuple(x.shape) for n, x in expected.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params/encoder_head/kernel": None}, r"1 missing \(encoder_head/kernel\) arrays"),
        ({"params/stranger": np.zeros(3)}, r"1 unknown \(stranger\) arrays"),
        ({"params/encoder_head/kernel": None, "params/encoder_haed/kernel": np.zeros((32, 16))},
         r"1 missing \(encoder_head/kernel\) and 1 unknown \(encoder_haed/kernel\)"),
        ({"params/decoder_stem/bias": np.zeros(7)}, r"1 arrays do not match the shapes .* decoder_stem.bias: \[7\]"),
        ({"params/pos_embedding_encoder": np.zeros((3, 3))}, r"pos_embedding_encoder has shape \[3, 3\]"),
        ({"params/decoder_stem/bias": np.array([{"a": 1}], object)}, "pickled data is never loaded"),
        ({"params/decoder_stem/bias": np.array(["a"] * 32)}, "decoder_stem/bias holds <U1, not real numbers"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = published(tmp_path / "x.npz", "oracle_vq_color.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        import_oracle(file, "color", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path, imported: Path) -> None:
    color = published(tmp_path / "color.npz", "oracle_vq_color.npz")
    with pytest.raises(UserError, match="checkpoint for labels {'color': 3}, but task nyu_depth has {'depth': 256}"):
        import_oracle(color, "depth", tmp_path / "out")
    with pytest.raises(UserError, match="not a stage I checkpoint.*give --stage lm"):
        import_oracle(imported / "lm.npz", "depth", tmp_path / "out")
    with pytest.raises(UserError, match="EmbedPatches/kernel is missing"):
        import_lm(color, imported / "oracle", tmp_path / "out")
    tensors = dict(golden("lm.npz"))
    fewer = published(
        tmp_path / "fewer.npz",
        "lm.npz",
        **{
            "params/decoder/EmbedTargets/embedding": tensors["params/decoder/EmbedTargets/embedding"][:20],
            "params/decoder/LogitsDense/kernel": tensors["params/decoder/LogitsDense/kernel"][:, :20],
            "params/decoder/LogitsDense/bias": tensors["params/decoder/LogitsDense/bias"][:20],
        },
    )
    with pytest.raises(UserError, match="has 19 codes, the oracle .* 24"):
        import_lm(fewer, imported / "oracle", tmp_path / "out")
    text = tmp_path / "text.npz"
    text.write_text("no arrays")
    with pytest.raises(UserError, match="pickled data is never loaded|truncated or not an .npz"):
        read_npz(text)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(color.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or not an .npz"):
        read_npz(cut)
    with pytest.raises(UserError, match="no such file"):
        read_npz(tmp_path / "nowhere.npz")
    assert not (tmp_path / "out").exists()
