"""Plugins named by a run directory are imported only if the user trusts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.cli import failure
from tests.support.paths import ROOT
from tests.support.runs import sign_all
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.config import plugins
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.experiments.ablation.grid import plan, read_grid
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.tasks.configuration import load_run

pytestmark = pytest.mark.usefixtures("no_trusted_plugins")


#: Registers a task derived from depth's, so that it can use the weights of a depth run.
PLUGIN = """
from pathlib import Path
from uvim_fsq.tasks.nyu_depth.task import NYUDepth
from uvim_fsq.tasks.registry import register_task

Path({mark!r}).touch()

@register_task({name!r})
class Stranger(NYUDepth):
    pass
"""


def stranger(folder: Path, run: Path, name: str, where: Path) -> tuple[Path, Path]:
    """A copy of `run` that names a plugin in the folder `where`, and the file that the plugin creates when imported."""
    copy, mark = folder / "downloaded", folder / "executed"
    shutil.copytree(run, copy)
    (where / f"{name}.py").write_text(PLUGIN.format(mark=str(mark), name=f"task_{name}"))
    for place in (copy, *([copy / "oracle"] if (copy / "oracle").exists() else [])):
        files = [place / "config.yaml", *place.glob("checkpoints/step_*/config.yaml")]
        for file in files:
            tree = yaml.safe_load(file.read_text())
            tree["plugins"] = [name]
            tree["task"]["name"] = f"task_{name}"
            file.write_text(yaml.safe_dump(tree))
    sign_all(copy)
    return copy, mark


def test_the_plugin_of_an_untrusted_run_is_not_imported(
    tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run, mark = stranger(tmp_path, lm_dir, "stranger_a", tmp_path)
    photo = next(lm_dir.rglob("*.png"))
    own = tmp_path / "own.yaml"
    own.write_text("stage: lm\ntrain: {out: x, steps: 3}\noptim: {warmup_steps: 1}\n")
    oracle = run / "oracle"
    for command in (
        ("evaluate", run),
        ("analyze", run, "--out", tmp_path / "analysis"),
        ("predict", run, photo, "--out", tmp_path / "out"),
        ("tune-decoder", run),
        ("train-lm", own, f"oracle={oracle}"),
        ("config", own, f"oracle={oracle}"),
        ("evaluate", oracle),
    ):
        said = failure(capsys, *command)
        assert f"the plugin 'stranger_a', which runs its code (from {tmp_path / 'stranger_a.py'})" in said, command
        assert "--trust" in said and "UVIM_FSQ_TRUST=1" in said and "plugins=[stranger_a]" in said
    with pytest.raises(UserError, match="stranger_a"):
        Predictor.from_run(run)
    with pytest.raises(UserError, match="stranger_a"):
        evaluate(run)
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flag", "override", "environment", "python", "named before", "entry point"])
def test_a_trusted_plugin_is_imported(tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"trusted_{way.replace(' ', '_')}"
    run, mark = stranger(tmp_path, lm_dir, name, tmp_path)
    if way == "flag":
        main(["evaluate", str(run), "--trust", "--limit", "1"])
    elif way == "override":
        main(["evaluate", str(run), f"plugins=[{name}]", "--limit", "1"])
    elif way == "environment":
        monkeypatch.setenv("UVIM_FSQ_TRUST", "0")
        with pytest.raises(UserError):
            load_checkpoint(run)
        monkeypatch.setenv("UVIM_FSQ_TRUST", "1")
        load_checkpoint(run)
    elif way == "python":
        assert Predictor.from_run(run, trust=True).task.name == f"task_{name}"
    elif way == "named before":
        load_run({"stage": "lm", "oracle": "x", "plugins": [name]})
        load_checkpoint(run)
    else:
        point = type("Point", (), {"module": name, "load": lambda self: None})()
        monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
        load_checkpoint(run)
    assert mark.exists()
    # Trusting one run does not extend to the next.
    if way in ("flag", "override"):
        other, _ = stranger(tmp_path / "second", lm_dir, f"other_{way}", tmp_path)
        with pytest.raises(UserError, match=f"other_{way}"):
            load_checkpoint(other)


@pytest.mark.slow
def test_files_in_the_current_folder_shadow_no_package(tmp_path: Path) -> None:
    """Stray files in the current folder have the names of packages that the command imports."""
    for name in ("timm", "omegaconf", "h5py", "wandb", "cv2"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the stray {name}.py ran')\n")
    (tmp_path / "beside_me.py").write_text("import beside_me_too\n")
    (tmp_path / "beside_me_too.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "import sys; sys.path.pop(0); from uvim_fsq.cli import main; main()"
    for program in (["-m", "uvim_fsq"], ["-c", script]):
        command = [sys.executable, *program, "config", str(ROOT / "configs/nyu_depth/quickstart_oracle.yaml")]
        done = subprocess.run(
            [*command, "plugins=[beside_me]", "data.root=none", "train.out=x"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "beside_me" in done.stdout, done.stderr
    if sys.version_info >= (3, 11):
        for name in ("socket", "random", "tempfile"):
            (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the stray {name}.py ran')\n")
        synth = ["synth", "--format", "nyu", "--num", "2", "--num-val", "1", "--size", "16", "--workers", "2"]
        made = subprocess.run(
            [*command[:3], *synth, "--out", "made"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert made.returncode == 0 and "stray" not in made.stderr, made.stderr
    done = subprocess.run([*command, "plugins=[wandb_]"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "plugin 'wandb_' cannot be imported" in done.stderr


def test_a_grids_plugin_is_trusted_by_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid_plugin.py").write_text(PLUGIN.format(mark=str(tmp_path / "mark"), name="task_grid_plugin"))
    (tmp_path / "oracle.yaml").write_text(
        "stage: oracle\nplugins: [grid_plugin]\ntask: {name: task_grid_plugin}\n"
        "train: {steps: 9}\noptim: {warmup_steps: 1}\n"
    )
    (tmp_path / "lm.yaml").write_text(
        "stage: lm\noracle: ''\nmodel: {encoder: {name: vit_tiny_patch16_224}}\n"
        "train: {steps: 9}\noptim: {warmup_steps: 1}\n"
    )
    (tmp_path / "grid.yaml").write_text("oracle: oracle.yaml\nlm: lm.yaml\nrows: {A: {}}\n")
    (cell,) = plan(read_grid(tmp_path / "grid.yaml"), tmp_path / "out")
    assert "plugins=[grid_plugin]" in cell.result.command
