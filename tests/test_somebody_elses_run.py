"""A run directory may be anybody's: what it names, links to and refers to does no harm to whoever uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.config import plugins
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.experiments.ablation.grid import plan, read_grid
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.tasks.configuration import load_run

ROOT = Path(__file__).resolve().parents[1]
#: Registers a task like depth's, so that a run of it works with the weights of one of depth.
PLUGIN = """
from pathlib import Path
from uvim_fsq.tasks.nyu_depth.task import NYUDepth
from uvim_fsq.tasks.registry import register_task

Path({mark!r}).touch()

@register_task({name!r})
class Stranger(NYUDepth):
    pass
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins with nothing named, and leaves the path as it was."""
    monkeypatch.setattr(plugins, "_named", set())
    monkeypatch.delenv("UVIM_FSQ_TRUST", raising=False)
    path = list(sys.path)
    yield
    sys.path[:] = path


def forget_sums(run: Path) -> None:
    """What a stranger changes has no sums, or ones to match."""
    for sums in run.rglob("sha256.json"):
        sums.unlink()


def change_config(run: Path, **changes: Any) -> None:
    forget_sums(run)
    for file in (run / "config.yaml", resolve_checkpoint(run) / "config.yaml"):
        tree = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (tree[section] if section else tree)[name] = value
        file.write_text(yaml.safe_dump(tree))


def stranger(folder: Path, run: Path, name: str, where: Path) -> tuple[Path, Path]:
    """A copy of `run` that names a plugin in the folder `where`, and the file that the plugin touches when it runs."""
    copy, mark = folder / "downloaded", folder / "executed"
    shutil.copytree(run, copy)
    forget_sums(copy)
    (where / f"{name}.py").write_text(PLUGIN.format(mark=str(mark), name=f"task_{name}"))
    for place in (copy, *([copy / "oracle"] if (copy / "oracle").exists() else [])):
        files = [place / "config.yaml", *place.glob("checkpoints/step_*/config.yaml")]
        for file in files:
            tree = yaml.safe_load(file.read_text())
            tree["plugins"] = [name]
            tree["task"]["name"] = f"task_{name}"
            file.write_text(yaml.safe_dump(tree))
    return copy, mark


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error line of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: "), said
    return said[-1]


def test_a_runs_plugin_is_not_imported(
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


@pytest.mark.parametrize("way", ["flag", "override", "environment", "python", "named before", "entry point"])
def test_what_the_user_trusts_is_imported(
    tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
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
    # Trust in one run is not trust in the next.
    if way in ("flag", "override"):
        other, _ = stranger(tmp_path / "second", lm_dir, f"other_{way}", tmp_path)
        with pytest.raises(UserError, match=f"other_{way}"):
            load_checkpoint(other)


def test_the_current_folder_shadows_nothing(tmp_path: Path) -> None:
    """Stray files beside the user, named as packages that the command imports, by module and by script."""
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
    assert "plugins=[grid_plugin]" in cell.lm_command


# ---------------------------------------------------------------- what a configuration refers to


def test_a_runs_configuration_refers_to_nothing_else(
    tmp_path: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    for changes in (
        {"data__train_split": "${oc.env:MY_SECRET}"},
        {"data__crop_area": [0.5, "${data.hflip}"]},
        {"task": {"name": "nyu_depth", "${oc.env:MY_SECRET}": 3}},
    ):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(oracle_dir, run)
        change_config(run, **changes)
        said = failure(capsys, "evaluate", run)
        assert "contains ${...}, which a run's configuration may not" in said and "hunter2" not in said
    run = tmp_path / "extends"
    shutil.copytree(oracle_dir, run)
    (tmp_path / "secret.yaml").write_text("password hunter2: 3\n")
    change_config(run, extends=str(tmp_path / "secret.yaml"))
    said = failure(capsys, "evaluate", run)
    assert "contains `extends`" in said and "hunter2" not in said
    # The user's own words are the user's.
    monkeypatch.setenv("MY_SPLIT", "val")
    main(["evaluate", str(oracle_dir), "data.train_split=${oc.env:MY_SPLIT}", "--json", str(tmp_path / "result.json")])
    assert load_run({"task": {"name": "nyu_depth"}, "data": {"root": "${oc.env:MY_SECRET}"}}).data.root == "hunter2"


@pytest.mark.parametrize(
    "content",
    [
        "root:x:0:0:hunter2:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin\n",
        "password hunter2 of mine: 3\n",
        "key: [hunter2\n",
        "hunter2",
        "a: 'hunter2\n",
        "a: b: hunter2\n",
        "? [hunter2]\n: 3\n",
        "a: !hunter2 3\n",
        "a: " + "9" * 5000,
    ],
)
def test_no_message_shows_what_another_file_holds(
    tmp_path: Path, oracle_dir: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text(content)
    (tmp_path / "own.yaml").write_text("extends: secret\ntask: {name: nyu_depth}\ntrain: {steps: 3, out: x}\n")
    said = failure(capsys, "config", tmp_path / "own.yaml")
    assert "hunter2" not in said and len(said) < 400
    run = tmp_path / "run"
    shutil.copytree(oracle_dir, run)
    forget_sums(run)
    for file in run.rglob("config.yaml"):
        file.unlink()
        file.symlink_to(tmp_path / "secret")
    said = failure(capsys, "evaluate", run)
    assert "hunter2" not in said and len(said) < 400


def test_configurations_beyond_all_bounds(tmp_path: Path, oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for text, message in (
        ("train: " + "[" * 20_000 + "]" * 20_000, "levels deep"),
        ("train: " + "{a: " * 20_000 + "1" + "}" * 20_000, "levels deep"),
        (laughs, "is not valid YAML"),
        ("x: &a [*a]", "is not valid YAML"),
        ("title: " + "x" * 1_000_001, "longer than 1000000 bytes"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "train.seed=a number with thousands of digits: must fit in 64 bits"),
        ("train: {seed: 18446744073709551616}", "must fit in 64 bits"),
        ("optim: {lr: " + "1" * 4000 + "}", "must be a number"),
    ):
        file = tmp_path / "a.yaml"
        file.write_text(f"task: {{name: nyu_depth}}\n{text}\n")
        assert message in failure(capsys, "config", file), text[:40]
        grid = tmp_path / "grid.yaml"
        grid.write_text(f"{text}\n")
        assert len(failure(capsys, "ablate", grid, "--out", tmp_path / "g")) < 500
    for override in ("train.steps=" + "[" * 20_000 + "]" * 20_000, ".".join("a" * 20_000) + "=1"):
        assert "is nested too deeply" in failure(capsys, "evaluate", oracle_dir, override)
    assert "number that is too long" in failure(capsys, "evaluate", oracle_dir, "train.seed=" + "9" * 5000)


def test_impossible_settings_of_a_run_are_one_line(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = next(lm_dir.rglob("*.png"))
    for place, change, said in (
        ("lm", {"eval__batch_size": 0}, "eval.batch_size=0: must be above 0"),
        ("lm", {"eval__batch_size": -3}, "eval.batch_size=-3: must be above 0"),
        ("lm", {"data__image_size": 0}, "data.image_size=0: must be above 0"),
        ("lm", {"model__num_heads": 3}, "not divisible by model.num_heads=3"),
        ("lm", {"model__width": -4}, "model.width=-4: must be above 0"),
        ("lm", {"model__mlp_dim": 10**12}, "must be below 2^31"),
        ("lm", {"model__mlp_dim": 2**31 - 1, "model__width": 2**31 - 2}, "needs a machine with more"),
        ("oracle", {"model__patch_size": 0}, "model.patch_size=0: must be above 0"),
        ("oracle", {"model__code_length": 2**40}, "must be below 2^31"),
    ):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(lm_dir, run)
        forget_sums(run)
        change_config(run / "oracle" if place == "oracle" else run, **change)
        assert said in failure(capsys, "predict", run, photo, "--out", tmp_path / "out"), change
    # How it was trained is past.
    run = tmp_path / "odd"
    shutil.copytree(lm_dir, run)
    change_config(run, optim__warmup_steps=50, train__keep=0)
    assert load_checkpoint(run, ["eval.seed=1"]).overrides == {"eval.seed": [0, 1]}
    with pytest.raises(UserError, match=r"optim.warmup_steps=50 must be below train.steps=5$"):
        load_checkpoint(run, ["train.steps=5"])
