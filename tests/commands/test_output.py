"""What commands print: where they are and what comes next, on terminals and under a launcher."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.ranks import run_ranks
from tests.support.small import LM, ORACLE
from tests.support.terminal import everything
from uvim_fsq.cli import main


@pytest.mark.slow
def test_commands_print_their_progress_and_the_next_step(
    tmp_path: Path, data: Path, oracle_dir: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle, lm = tmp_path / "oracle.yaml", tmp_path / "lm.yaml"
    oracle.write_text(yaml.safe_dump(ORACLE))
    lm.write_text(yaml.safe_dump(LM))

    def said(*arguments: str | Path) -> list[str]:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out.splitlines()

    out = tmp_path / "o"
    lines = said("train-oracle", oracle, f"data.root={data}", f"train.out={out}", "train.accumulate=2")
    assert lines[0] == f"{oracle}: loading ..."
    (start,) = [line for line in lines if line.startswith("training on ")]
    assert re.search(
        r" 0\.0\d M parameters, 24 samples, batch 8 = 4 x 2 x 1 \(micro x accumulate x processes\), step 0 of 6, into ",
        start,
    )
    assert lines[-2:] == [f"trained: {out}", f"next: uvim-fsq train-lm {lm} oracle={out} train.out=..."]
    lines = said("train-lm", lm, f"oracle={out}", f"train.out={tmp_path / 'l'}")
    assert lines[-1].startswith(f"next: uvim-fsq predict {tmp_path / 'l'} PHOTOS --out ")
    lines = said("evaluate", lm_dir, "--limit", "1")
    assert lines[0] == f"{lm_dir}: loading ..." and lines[-1].startswith(f"next: uvim-fsq predict {lm_dir}")
    assert said("evaluate", oracle_dir, "--limit", "1")[-1].startswith("next: uvim-fsq train-lm ")
    rooms = tmp_path / "rooms"
    lines = said("synth", "--format", "nyu", "--num", 2, "--num-val", 1, "--size", 16, "--out", rooms, "--workers", 1)
    assert lines[-1].startswith("next: uvim-fsq train-oracle nyu_depth/oracle data.root=")
    assert said("data", "check", rooms, "--task", "nyu_depth")[-1] == lines[-1]


@pytest.mark.slow
def test_a_real_terminal_keeps_a_readable_history(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    arguments = ["train-oracle", str(file), f"data.root={data}", f"train.out={tmp_path / 'run'}", "train.steps=40"]
    main_end, end = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "uvim_fsq", *arguments]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=env) as process:
        os.close(end)
        raw = everything(main_end)
    assert process.returncode == 0, raw
    # What remains visible of a line follows its last carriage return.
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.rpartition("\r")[2]) for line in raw.split("\r\n")]
    assert "[#" in raw and not any("[#" in line for line in lines)
    kept = [line for line in lines if line.startswith("oracle ")]
    assert kept[0].startswith("oracle 1/40") and any(line.startswith("oracle 40/40") for line in kept)


@pytest.mark.multi
@pytest.mark.slow
def test_only_the_main_rank_prints(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = run_ranks(2, "cli", "train-oracle", str(file), f"data.root={data}", f"train.out={tmp_path / 'run'}")
    assert "batch 8 = 4 x 1 x 2 (micro x accumulate x processes)" in said
    for words in ("loading ...", "training on ", "oracle 1/6  eta", "oracle 6/6  evaluation", "trained: ", "next: "):
        assert said.count(words) == 1, (words, said)
