"""Mistakes whose message used to leave the user guessing: one line that says what is wrong and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.small import ORACLE, lm_run
from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.interop.import_uvim import import_oracle
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.tasks.configuration import load_run


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_seeds_have_a_range(oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("train.seed", "eval.seed"):
        validate(load_run(ORACLE, ["train.out=x", f"{key}={2**32 - 1}"]))
        for seed, message in (
            (2**32, f"{key}={2**32}: must be below 2^32"),
            (2**62, f"{key}={2**62}: must be below 2^32"),
            (-1, f"{key}=-1: must not be negative"),
            (2**63, f"{key}={2**63}: must fit in 64 bits"),
            (-(2**64), f"{key}=-{2**64}: must fit in 64 bits"),
        ):
            with pytest.raises(UserError) as caught:
                validate(load_run(ORACLE, ["train.out=x", f"{key}={seed}"]))
            assert message in str(caught.value)
    assert "eval.seed=4611686018427387904: must be below 2^32" in said(
        capsys, "evaluate", oracle_dir, f"eval.seed={2**62}"
    )


def test_keys_of_another_task_name_their_task() -> None:
    for override, message in (
        ("task.max_instances=3", "task.max_instances is a key of coco_panoptic, not of task.name=nyu_depth"),
        ("task.inception_weights=x", "task.inception_weights is a key of imagenet_color, not of task.name=nyu_depth"),
        ("task.max_instanses=3", "unknown key task.max_instanses; known keys: "),
        ("task.num_bin=3", "unknown key task.num_bin; did you mean task.num_bins?"),
    ):
        with pytest.raises(UserError) as caught:
            load_run(ORACLE, [override])
        assert message in str(caught.value)


def test_an_oracle_that_is_gone(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
    run, gone = tmp_path / "lm", tmp_path / "gone"
    shutil.copytree(lm_dir, run)
    shutil.rmtree(run / "oracle")
    config = resolve_checkpoint(run) / "config.yaml"
    (resolve_checkpoint(run) / "sha256.json").unlink(missing_ok=True)
    config.write_text(config.read_text().replace(f"oracle: {oracle_dir}", f"oracle: {gone}"))
    with pytest.raises(UserError) as caught:
        evaluate(run)
    assert f"{run / 'oracle'} is missing" in str(caught.value) and str(gone) in str(caught.value)
    with pytest.raises(UserError, match=f"oracle={gone}: no such run or checkpoint directory; train the oracle first"):
        lm_run(tmp_path / "new", gone)


def test_import_of_an_unknown_task(tmp_path: Path) -> None:
    # Said before the file, of gigabytes, is read.
    for task in ("nyu", "segmentation", "depht"):
        with pytest.raises(UserError, match=f"--task {task}: UViM published depth, panoptic, color; give one of these"):
            import_oracle(tmp_path / "none.npz", task, tmp_path / "out")
    for task in ("depth", "nyu_depth"):
        with pytest.raises(UserError, match="no such file"):
            import_oracle(tmp_path / "none.npz", task, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "kind"), [("resnet18", "resnet"), ("convnext_atto", "convnext"), ("swin_tiny_patch4_window7_224", "swin")]
)
def test_an_image_encoder_that_is_no_vit(name: str, kind: str, tmp_path: Path, oracle_dir: Path) -> None:
    with pytest.raises(
        UserError, match=f"model.encoder.name={name} is not a vision transformer .timm's {kind}"
    ) as caught:
        build_image_encoder(EncoderConfig(name=name), 224)
    assert "__init__" not in str(caught.value) and "choose e.g. vit_base_patch16_224" in str(caught.value)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_weights_of_the_image_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224"

    def message(weights: object) -> str:
        with pytest.raises(UserError) as caught:
            build_image_encoder(EncoderConfig(name=name, weights=str(weights)), 224)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file; give none, hub or a local weights file" in message(tmp_path / "none.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    assert f"does not contain weights of model.encoder.name={name} (its arrays belong to a different" in message(
        tmp_path / "other.pth"
    )
    torch.save({"a": Code(tmp_path / "mark")}, tmp_path / "code.pth")
    assert "contains pickled Python objects, which are never loaded" in message(tmp_path / "code.pth")
    assert not (tmp_path / "mark").exists()
    (tmp_path / "text.npz").write_text("no zip")
    assert "text.npz is truncated or not an .npz" in message(tmp_path / "text.npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(30_000_000, np.float32))
    assert "would unpack to 120000" in message(tmp_path / "bomb.npz")

    def offline() -> None:
        raise OSError("We cannot reach the Hub\nTraceback of the client")

    import timm

    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: offline() if pretrained else real(*a, **k)
    )
    assert message("hub").endswith(
        "the published weights of vit_tiny_patch16_224 are not on this machine and cannot be fetched (We cannot reach "
        "the Hub); go online once, or give the path of a file with them, or weights=none"
    )
