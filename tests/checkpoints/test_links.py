"""Training, evaluation and analysis neither write nor delete anything behind a link in a run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.small import lm_run
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.training.run import train


@pytest.mark.slow
@pytest.mark.parametrize("link", ["checkpoints", "panels", "tensorboard", "checkpoints/.tmp_step_00000009", "oracle"])
def test_training_writes_and_deletes_nothing_behind_a_link(
    lm_dir: Path, oracle_dir: Path, tmp_path: Path, link: str
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(lm_dir, run)
    mine.mkdir()
    if (run / link).exists():
        shutil.copytree(run / link, mine, dirs_exist_ok=True)
        shutil.rmtree(run / link)
    (run / link).symlink_to(mine)
    before = sorted(mine.rglob("*"))
    with pytest.raises(UserError, match=f"{link} is a link that leads out of"):
        train(lm_run(run, oracle_dir, "train.resume=auto", "train.steps=9", "train.save_every=1", "train.keep=1"))
    assert sorted(mine.rglob("*")) == before


@pytest.mark.slow
def test_evaluation_and_analysis_replace_links(lm_dir: Path, tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(lm_dir, run)
    precious.write_text("mine")
    names = ["evaluation.json", "rows.csv", "page.html", "metrics.jsonl"]
    names += ["analysis/analysis.json", "analysis/report.html", "analysis/stitched.png"]
    (run / "analysis").mkdir()
    main(["analyze", str(run), "--limit", "2"])
    names += [f"analysis/{file.name}" for file in (run / "analysis").glob("*.png")]
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    main(["evaluate", str(run), "--limit", "2", "--csv", str(run / "rows.csv"), "--report", str(run / "page.html")])
    main(["evaluate", str(run), "--limit", "2", "--json", str(run / "evaluation.json")])
    main(["analyze", str(run), "--limit", "2"])
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("place", ["official", "official/oracle", "analysis"])
def test_a_default_output_folder_that_is_a_link_is_refused(
    place: str, lm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(lm_dir, run)
    mine.mkdir()
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).symlink_to(mine)
    command = ["analyze", str(run)] if place == "analysis" else ["evaluate", str(run), "--official"]
    with pytest.raises(SystemExit):
        main(command)
    assert "is a link that leads out of" in capsys.readouterr().err and not list(mine.iterdir())
