"""The templates for Slurm, run on a cluster of stand-ins: ranks, time limits, canceled jobs, grids."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.slurm import Cluster

SLURM = ROOT / "tools" / "slurm"
TRAIN, ARRAY, GRID = SLURM / "train.sbatch", SLURM / "array.sbatch", SLURM / "grid.sh"


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_process_of_every_node_gets_its_rank(cluster: Cluster) -> None:
    assert cluster.run(TRAIN, "train-oracle", "nyu_depth/oracle") == 0
    rest = "node1:20123 train-oracle nyu_depth/oracle train.resume=auto"
    assert sorted(cluster.lines("started")) == [f"{i} {i % 2} 4 {rest}" for i in range(4)]


def test_what_trains_continues_where_it_stopped(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", tasks=1, per_node=1)
    assert cluster.run(TRAIN, "tune-decoder", "runs/lm") == 0
    assert cluster.lines("started") == ["   node1:20123 tune-decoder runs/lm train.resume=auto"]


def test_a_single_process_needs_no_rank(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", tasks=1, per_node=1)
    assert cluster.run(TRAIN, "evaluate", "runs/lm") == 0
    assert cluster.lines("started") == ["   node1:20123 evaluate runs/lm"]


def test_a_job_out_of_time_is_saved_and_goes_back_into_the_queue(cluster: Cluster) -> None:
    assert cluster.run(TRAIN, "train-lm", "c", behavior="waits", send=signal.SIGUSR1) == 143
    assert cluster.lines("saved") == ["saved"] * 4 and cluster.lines("requeued") == ["40123"]


def test_a_job_whose_script_alone_is_cancelled_is_saved_and_stays_ended(cluster: Cluster) -> None:
    assert cluster.run(TRAIN, "train-lm", "c", behavior="waits", send=signal.SIGTERM) == 143
    assert cluster.lines("saved") == ["saved"] * 4 and not cluster.lines("requeued")


def test_a_job_that_fails_stays_ended(cluster: Cluster) -> None:
    assert cluster.run(TRAIN, "train-lm", "c", behavior="fails") == 2
    assert not cluster.lines("requeued")


def test_a_job_is_not_restarted_for_ever(cluster: Cluster) -> None:
    given = {"SLURM_RESTART_COUNT": "3", "MOST_RESTARTS": "3"}
    assert cluster.run(TRAIN, "train-lm", "c", behavior="waits", send=signal.SIGUSR1, **given) == 143
    assert not cluster.lines("requeued")


@pytest.mark.parametrize("ends_with", ["143", "130"])
def test_an_array_task_runs_its_line_and_is_requeued_alone(tmp_path: Path, ends_with: str) -> None:
    cluster = Cluster(tmp_path / "cluster", tasks=1, per_node=1)
    (cluster.folder / "list").write_text("uvim-fsq train-oracle a\nuvim-fsq train-lm b 'task.x=1 2'\n")
    given = {"SLURM_ARRAY_TASK_ID": "2", "ENDS_WITH": ends_with}
    code = cluster.run(ARRAY, "list", behavior="waits", send=signal.SIGUSR1, **given)
    assert code == int(ends_with) and cluster.lines("requeued") == ["40123_2"]
    assert cluster.lines("started") == ["   : train-lm b task.x=1 2"]


def test_an_array_runs_only_commands_of_this_package(cluster: Cluster) -> None:
    (cluster.folder / "list").write_text("rm -r runs\n")
    assert cluster.run(ARRAY, "list", SLURM_ARRAY_TASK_ID="1") == 2
    assert cluster.run(ARRAY, "list", SLURM_ARRAY_TASK_ID="7") == 2, "there is no such line"


def test_a_grid_becomes_arrays_that_train_shared_models_once(cluster: Cluster) -> None:
    (cluster.folder / "o2").mkdir()
    (cluster.folder / "o2" / "evaluation.json").write_text("{}")
    cells = [
        ("A", "train-oracle c train.out=o1 train.resume=auto", "train-lm c oracle=o1 train.out=l1 train.resume=auto"),
        ("B", "train-oracle c train.out=o1 train.resume=auto", "train-lm c oracle=o1 train.out=l2 train.resume=auto"),
        ("C", "train-oracle c train.out=o2 train.resume=auto", "evaluate l2 --json x"),
    ]
    printed = "".join(f"{name}, seed 0\n" + "".join(f"  uvim-fsq {c}\n" for c in rest) for name, *rest in cells)
    (cluster.folder / "printed").write_text(printed)
    assert cluster.run(GRID, "grid.yaml", "--out", "runs/g", behavior="prints", SBATCH_OPTIONS="-p gpu") == 0
    folder = cluster.folder / "runs" / "g" / "slurm"
    assert folder.joinpath("train_oracle.txt").read_text() == f"uvim-fsq {cells[0][1]}\n", "o2 is finished"
    assert len(folder.joinpath("train_lm.txt").read_text().splitlines()) == 2
    assert folder.joinpath("tables.txt").read_text().split() == [
        "uvim-fsq",
        "ablate",
        "grid.yaml",
        "--out",
        "runs/g",
        "--jobs",
        "1",
    ]
    assert cluster.lines("submitted") == [
        f"--parsable -p gpu --array=1-1 {ARRAY} runs/g/slurm/train_oracle.txt",
        f"--parsable -p gpu --dependency=afterany:101 --array=1-2 {ARRAY} runs/g/slurm/train_lm.txt",
        f"--parsable -p gpu --dependency=afterany:101:102 --array=1 {ARRAY} runs/g/slurm/tables.txt",
    ]


def test_a_grid_of_synthetic_scenes_renders_them_first(cluster: Cluster) -> None:
    lines = ["synth --num 8 --out runs/g/data", "train-oracle c train.out=o1", "train-direct c train.out=d1"]
    (cluster.folder / "printed").write_text("scenes\n" + "".join(f"  uvim-fsq {line}\n" for line in lines))
    assert cluster.run(GRID, "grid.yaml", "--out", "runs/g", behavior="prints") == 0
    place = "runs/g/slurm"
    assert (cluster.folder / place / "scenes.txt").read_text() == f"uvim-fsq {lines[0]}\n"
    assert cluster.lines("submitted") == [
        f"--parsable --array=1 {ARRAY} {place}/scenes.txt",
        f"--parsable --dependency=afterany:101 --array=1-1 {ARRAY} {place}/train_oracle.txt",
        f"--parsable --dependency=afterany:101 --array=1-1 {ARRAY} {place}/train_direct.txt",
        f"--parsable --dependency=afterany:102:103 --array=1 {ARRAY} {place}/tables.txt",
    ]
