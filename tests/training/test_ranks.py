"""Several processes train like one, and an error in one of them ends all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from tests.support.ranks import finish, run_ranks, start_ranks
from tests.support.runs import fit_run, training_lines
from tests.support.small import ORACLE, direct_run, lm_run, oracle_run
from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.cli import main
from uvim_fsq.config.schema import Run
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.training.run import train
from uvim_fsq.training.stages import OracleStage

RANKS = 3


def configurations(folder: Path, data: Path, oracle: Path) -> dict[str, Run]:
    """All stages, both quantizers. Three ranks split 8 images as 3 + 3 + 2, accumulating as 2 + 2 + 1 + 1 + 1 + 1."""
    common = ["train.steps=4", "model.code_dropout=none"]
    vq = ["model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8"]
    return {
        "oracle": oracle_run(folder / "oracle", data, *common, "train.log_every=2", "train.eval_every=2"),
        "vq": oracle_run(folder / "vq", data, *common, *vq, "train.accumulate=2"),
        "lm": lm_run(folder / "lm", oracle, "train.steps=4", "train.accumulate=2"),
        "direct": direct_run(folder / "direct", data, "train.steps=4", "train.accumulate=2"),
    }


def damaged(data: Path, copy: Path, split: str, count: int) -> Path:
    """A copy of the data with `count` files of a split broken."""
    shutil.copytree(data, copy)
    for victim in sorted(copy.rglob(f"{split}/**/*.h5"))[:count]:
        victim.write_bytes(victim.read_bytes()[:300])
    return copy


def train_all(folder: str, data: str, oracle: str, bad: str) -> None:
    """Trains and evaluates every configuration, evaluates fewer images than there are ranks, trains on bad data."""
    torch.set_num_threads(1)
    for run in configurations(Path(folder), Path(data), Path(oracle)).values():
        train(run)
    fit_run(oracle_run(Path(folder) / "bad", Path(bad), "train.steps=4", "data.max_bad_samples=4"))
    main(["evaluate", f"{folder}/lm", "--limit=2", f"--json={folder}/few.json", f"--csv={folder}/few.csv"])
    assert not torch.distributed.is_initialized(), "the command has not parted from the others"


@pytest.mark.multi
@pytest.mark.slow
def test_three_ranks_equal_one(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    others = (str(data), str(oracle_dir), str(damaged(data, tmp_path / "data", "train", 4)))
    said = run_ranks(RANKS, "tests.training.test_ranks:train_all", str(tmp_path / "three"), *others)
    assert said.count("written: ") == 1, "one process prints and writes"
    assert said.count(f"batch 8 = {8 / RANKS:g} x 1 x {RANKS} ") == 2
    train_all(str(tmp_path / "one"), *others)
    for name in configurations(tmp_path, data, oracle_dir):
        one, three = tmp_path / "one" / name, tmp_path / "three" / name
        assert len(training_lines(one)) == len(training_lines(three)) > 1
        for ours, theirs in zip(training_lines(three), training_lines(one), strict=True):
            # The last bit of a logit may decide which is the largest.
            bits = {key: 2e-3 if key.endswith("accuracy") else 2e-5 for key in theirs}
            assert all(abs(ours[key] - theirs[key]) <= bits[key] for key in bits), (name, ours, theirs)
        ours, theirs = (safetensors.torch.load_file(ckpt.checkpoints(d)[-1] / ckpt.WEIGHTS) for d in (three, one))
        for key, value in theirs.items():
            assert torch.allclose(ours[key], value, atol=2e-4, rtol=1e-3), (name, key)
        assert_same_result(three / "evaluation.json", one / "evaluation.json")
    assert_same_result(tmp_path / "three" / "few.json", tmp_path / "one" / "few.json")
    rows = (tmp_path / "three" / "few.csv").read_text().splitlines()
    assert sorted(rows) == sorted((tmp_path / "one" / "few.csv").read_text().splitlines()) and len(rows) == 1 + 3 * 2
    for count in ("one", "three"):
        # Three steps meet every file, each in one of the ranks, and in the fourth all know.
        assert training_lines(tmp_path / count / "bad")[-1]["bad_samples"] == 4
        state, _ = ckpt.load_trainer_state(ckpt.checkpoints(tmp_path / count / "bad")[-1])
        assert len(state["bad_samples"]) == 4 and all(".h5" in text for text in state["bad_samples"].values())


def assert_same_result(ours: Path, theirs: Path) -> None:
    """Figures, and sums over all images."""
    one, other = (json.loads(file.read_text()) for file in (ours, theirs))
    assert one["images"] == other["images"] and one["code_counts"] == other["code_counts"]
    assert one["figures"].keys() == other["figures"].keys()
    for name, figures in one["figures"].items():
        assert figures == pytest.approx(other["figures"][name], abs=1e-4), name


def out_of_memory(*arguments: str) -> None:
    """The command line, with a step that fails on the second of two ranks."""
    original = OracleStage.step

    def step(*given):
        if processes.state().process_index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*given)

    OracleStage.step = step
    main(list(arguments))


@pytest.mark.multi
@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_message(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    config = tmp_path / "oracle.yaml"
    config.write_text(yaml.safe_dump(ORACLE))
    bad = [damaged(data, tmp_path / split, split, 1) for split in ("train", "val")]
    train = ("train-oracle", str(config))
    bad_file = (*train, f"train.out={tmp_path / 'bad'}", f"data.root={bad[0]}", "data.max_bad_samples=0")
    no_memory = (*train, f"train.out={tmp_path / 'memory'}", f"data.root={data}")
    # As on a machine without a GPU where nobody has said so: Accelerate would not see that there are two.
    silent = {"ACCELERATE_USE_CPU": "false"}
    started = {
        "cannot be read": start_ranks(2, "cli", *bad_file),
        "^error: not enough memory .CUDA": start_ranks(2, "tests.training.test_ranks:out_of_memory", *no_memory),
        "cannot be read.*": start_ranks(2, "cli", "evaluate", str(oracle_dir), f"data.root={bad[1]}", env=silent),
    }
    for message, process in started.items():
        said = finish(process)
        ours = said[: said.find("torch/distributed/elastic")]
        assert process.returncode == 1 and len(re.findall(message, said, re.M)) == 1, said
        # Whoever was waiting is ended by the launcher, or says one line.
        assert "Traceback" not in ours and ours.count("stopped: another process") <= 1, said
        assert "gloo" not in ours and "Connection" not in ours, said


def different(value: object) -> list[object]:
    """In place of `processes.gather`: what a second process would give that has loaded something else."""
    return [value, None if isinstance(value, Path) or value is None else value[::-1]]


def test_processes_that_loaded_different_checkpoints_stop(
    tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is resumed: an LM's oracle, and the checkpoint to evaluate."""
    monkeypatch.setattr(processes, "gather", different)
    with pytest.raises(UserError, match="different checkpoints from .*step_00000006"):
        evaluate(oracle_dir)
    with pytest.raises(UserError, match="different checkpoints from the oracle's run"):
        fit_run(lm_run(tmp_path / "lm", oracle_dir))
