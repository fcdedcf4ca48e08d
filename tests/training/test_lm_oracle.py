"""An LM's run keeps a copy of the oracle that it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.runs import at, fit_run, outcome, weights
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash, recorded_hashes
from uvim_fsq.errors import UserError
from uvim_fsq.training.run import train


@pytest.fixture
def lm_of_own_oracle(tmp_path: Path, data: Path, oracle_dir: Path) -> tuple[Path, Path]:
    """A half-trained LM, and its oracle's run, in which another checkpoint has become the best since."""
    oracle, out = tmp_path / "oracle", tmp_path / "lm"
    shutil.copytree(oracle_dir, oracle)
    train(lm_run(out, oracle, "train.save_every=3", "train.keep=9"))
    shutil.rmtree(at(out, 6))
    (out / "evaluation.json").unlink()
    newer = at(oracle, 7)
    model = load_checkpoint(oracle).oracle
    moved = {name: value + 0.3 for name, value in model.state_dict().items()}
    config = (at(oracle, 6) / "config.yaml").read_text()
    ckpt.save_checkpoint(oracle, 7, config=config, weights=moved, state={"step": 7})
    assert load_checkpoint(oracle).checkpoint == newer
    return out, oracle


@pytest.mark.slow
def test_a_resumed_lm_keeps_its_oracle(tmp_path: Path, lm_dir: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, oracle = lm_of_own_oracle
    wanted = recorded_hashes(at(out, 3))["oracle"]
    assert wanted == file_hash(at(oracle, 6) / ckpt.WEIGHTS) == file_hash(out / "oracle" / ckpt.WEIGHTS)
    train(lm_run(out, oracle, "train.resume=auto"))
    assert file_hash(out / "oracle" / ckpt.WEIGHTS) == wanted == recorded_hashes(at(out, 6))["oracle"]
    one, two = weights(at(out, 6)), weights(at(lm_dir, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert outcome(out)["result"] == outcome(lm_dir)["result"]


@pytest.mark.slow
def test_a_resumed_lm_refuses_another_oracle(tmp_path: Path, data: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, oracle = lm_of_own_oracle
    other = fit_run(oracle_run(tmp_path / "other", data, "train.seed=1", "train.steps=3"))
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"oracle={other}: .* a different one; leave oracle={oracle} as it was"):
        fit_run(lm_run(out, other, "train.resume=auto"))
    assert (out / "config.yaml").read_bytes() == before
    # The same one under another name, and a name that leads nowhere.
    for name in (shutil.copytree(oracle, tmp_path / "moved"), tmp_path / "gone"):
        assert lm_run(out, name, "train.resume=auto").task.name == "nyu_depth"


@pytest.mark.slow
def test_a_new_lm_takes_the_best_checkpoint_of_its_oracle(tmp_path: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    _, oracle = lm_of_own_oracle
    out = fit_run(lm_run(tmp_path / "new", oracle, "train.resume=auto", "train.steps=3"))
    assert recorded_hashes(at(out, 3))["oracle"] == file_hash(at(oracle, 7) / ckpt.WEIGHTS)


@pytest.mark.slow
def test_a_missing_or_replaced_copy_of_the_oracle(tmp_path: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, oracle = lm_of_own_oracle
    copy = out / "oracle"
    shutil.rmtree(copy)
    # The checkpoint that it was copied from is still there.
    assert torch.equal(
        load_checkpoint(out).oracle.state_dict()["encoder_head.weight"], weights(at(oracle, 6))["encoder_head.weight"]
    )
    fit_run(lm_run(out, oracle, "train.resume=auto"))
    assert file_hash(copy / ckpt.WEIGHTS) == file_hash(at(oracle, 6) / ckpt.WEIGHTS)
    ckpt.copy_checkpoint(at(oracle, 7), copy)
    for use in (lambda: load_checkpoint(out), lambda: lm_run(out, oracle, "train.resume=auto")):
        with pytest.raises(UserError, match="lm/oracle is not the oracle that .* was trained on"):
            use()
    shutil.rmtree(copy)
    shutil.rmtree(at(oracle, 6))
    for use in (lambda: load_checkpoint(out), lambda: lm_run(out, oracle, "train.resume=auto")):
        with pytest.raises(UserError, match="lm/oracle is missing, .*; copy the LM's whole run directory"):
            use()


def test_a_damaged_copy_of_the_oracle_is_named(lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, _ = lm_of_own_oracle
    file = out / "oracle" / ckpt.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="lm/oracle/model.safetensors is damaged"):
        load_checkpoint(out)
