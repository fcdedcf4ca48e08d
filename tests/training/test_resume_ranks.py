"""Several processes resume the same checkpoint, or stop."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.ranks import finish, run_ranks, start_ranks
from tests.support.runs import another_process, at, outcome, weights
from tests.support.small import ORACLE
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.run_directory import checkpoints, step_name
from uvim_fsq.cli import main as cli


def rank_in_own_folder(folder: str, data: str) -> None:
    """What a rank runs: training in a directory of its own under the same name, as on machines that share no disk."""
    os.chdir(Path(folder) / f"rank{os.environ['RANK']}")
    file = Path("run.yaml")
    file.write_text(yaml.safe_dump(ORACLE))
    keys = [f"data.root={data}", "train.out=run", "train.resume=auto"]
    cli(["train-oracle", str(file), *keys])


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("case", ["missing", "another", "damaged"])
def test_ranks_resume_the_same_checkpoint_or_stop(tmp_path: Path, data: Path, oracle_dir: Path, case: str) -> None:
    out = [tmp_path / f"rank{rank}" / "run" for rank in (0, 1)]
    for place in out:
        shutil.copytree(oracle_dir, place)
    other = weights(at(out[1], 6))
    if case == "missing":
        shutil.rmtree(at(out[1], 6))
    elif case == "damaged":
        (at(out[1], 6) / ckpt.WEIGHTS).write_bytes(b"")
    else:
        config = (at(out[1], 6) / "config.yaml").read_text()
        state = torch.load(at(out[1], 6) / ckpt.STATE, weights_only=True)
        moved = {name: value + 1 for name, value in other.items()}
        ckpt.save_checkpoint(out[1], 6, config=config, weights=moved, state=state)
    process = start_ranks(2, "tests.training.test_resume_ranks:rank_in_own_folder", str(tmp_path), str(data))
    said = finish(process)
    wanted = {
        "missing": "error: process 1 has no run/checkpoints/step_00000006; the run directory must be shared",
        "damaged": "error: run/checkpoints/step_00000006/model.safetensors is damaged",
        "another": "error: the processes loaded different checkpoints from run/checkpoints/step_00000006",
    }
    assert process.returncode != 0 and wanted[case] in said, said
    assert [p.name for p in checkpoints(out[0])] == [step_name(6)]


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_save_resume_and_lock(tmp_path: Path, data: Path) -> None:
    """Only the first takes the lock, and all stop where another training holds it."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    keys = ["train-oracle", str(file), f"data.root={data}", "data.selection_split=holdout", "train.eval_every=2"]
    out = tmp_path / "run"
    with another_process(out):
        process = start_ranks(2, "cli", *keys, f"train.out={out}")
        said = finish(process)
        assert process.returncode != 0 and "is being trained by process" in said, said
    run_ranks(2, "cli", *keys, f"train.out={out}")
    whole = outcome(out)
    for late in checkpoints(out)[1:]:
        shutil.rmtree(late)
    run_ranks(2, "cli", *keys, f"train.out={out}", "train.resume=auto")
    assert outcome(out) == whole
