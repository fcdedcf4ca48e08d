"""Completion scripts, asked as the shell would ask them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from uvim_fsq.cli import COMMANDS, main


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    main(["completion", "bash"])
    file = tmp_path / "completion.bash"
    file.write_text(capsys.readouterr().out)
    return file


def completions(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _uvim_fsq; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", ask, "bash", str(script), "uvim-fsq", *words],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("train-",), ["train-oracle", "train-lm", "train-direct"]),
        (("data", "ch"), ["check"]),
        (("data", "prepare", "--t"), ["--task"]),
        (("train-lm", "loss.t"), ["loss.task_weight="]),
        (("train-lm", "model.code_l"), []),
        (("train-oracle", "model.code_l"), ["model.code_length="]),
        (("plan", "nyu_depth/lm_p"), ["nyu_depth/lm_parallel", "nyu_depth/lm_parallel_single_gpu"]),
        (("plan", "ablations/l"), []),
        (("ablate", "ablations/l"), ["ablations/levels", "ablations/levels-small"]),
        (("train-lm", "ancestors"), []),
        (("runs", "--sort", "st"), ["stage", "steps", "state"]),
        (("completion", "z"), ["zsh"]),
        (("evaluate", "compl"), ["completion.bash"]),
    ],
)
def test_bash_offers(words: tuple[str, ...], offered: list[str], script: Path) -> None:
    assert sorted(completions(script, *words)) == sorted(offered)


def test_every_command_is_offered(script: Path) -> None:
    assert set(completions(script, "")) >= {*COMMANDS, "data", "--debug"}


def test_the_script_for_zsh_is_that_for_bash_with_zshs_own_preparation(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["completion", "zsh"])
    text = capsys.readouterr().out
    assert text.endswith(script.read_text()) and "bashcompinit" in text
