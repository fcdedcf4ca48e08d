"""The scripts in tools/ that run one command each."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
#: Script -> arguments with a mistake, and what the error says about it.
MISTAKES = {
    "train_oracle": (["nyu_depth/quickstart_oracle", "optim.lrr=3"], "did you mean optim.lr?"),
    "train_lm": (["nyu_depth/quickstart_oracle"], "use uvim-fsq train-oracle"),
    "train_direct": (["nyu_depth/quickstart_lm"], "use uvim-fsq train-lm"),
    "evaluate": (["nowhere"], "no such run"),
    "predict": (["nowhere", "eval.seed=1", "--out", "out"], "name at least one image"),
    "ablate": (["nowhere.yaml"], "nowhere.yaml"),
    "analyze": (["nowhere"], "no such run"),
    "benchmark": (["decode"], "needs a configuration"),
    "import_uvim": (["nowhere.npz", "--out", "out"], "--task depth, panoptic or color"),
}


def run_script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Runs a script in this process and returns its exit code."""
    file = TOOLS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(file), run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize("name", MISTAKES)
def test_help_names_the_script_and_only_its_own_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(name, ["--help"], monkeypatch) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name}.py [") and f"Example: python tools/{name}.py " in text
    assert "--debug" in text and "--trust" in text and "COMMAND" not in text
    assert ("--jobs" in text) == (name == "ablate") and ("--official" in text) == (name == "evaluate")
    assert ("optim.lr" in text) == (
        name in ("train_oracle", "train_lm", "train_direct", "evaluate", "predict", "analyze")
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_user_error_is_one_line_and_exit_code_2(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert run_script(name, arguments, monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


def test_every_command_that_trains_or_uses_a_run_has_a_script() -> None:
    scripts = {file.stem for file in TOOLS.glob("*.py") if "run_command(" in file.read_text()}
    assert scripts == set(MISTAKES)


@pytest.mark.slow
def test_a_script_behaves_as_the_command_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "train_oracle.py"), "nyu_depth/quickstart_oracle", "optim.lrr=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "error: unknown key optim.lrr; did you mean optim.lr?"
    done = subprocess.run([*command, "--debug"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
