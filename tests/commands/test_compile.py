"""`uvim-fsq compile`: its arguments, and what it writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.inference import ahead_of_time
from uvim_fsq.inference.one_graph import PredictionGraph
from uvim_fsq.inference.packages import find_packages


@pytest.mark.parametrize("batch", ["0", "1,,32", "-1", "one", "1,1.5", ""])
def test_a_wrong_batch_size_is_one_line(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compile", "nowhere", f"--batch={batch}"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said == f"error: --batch {batch}: give batch sizes above 0 such as 1,32\n"


def test_packages_for_the_given_settings_are_found_with_them(
    tmp_path: Path,
    own_cache: Path,
    random_runs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(graph: PredictionGraph, image: torch.Tensor, file: Path) -> Path:
        file.write_text(f"code for {tuple(image.shape)}")
        return file

    run = shutil.copytree(random_runs[1], tmp_path / "run")
    monkeypatch.setattr(ahead_of_time, "compile_graph", write)
    main(["compile", str(run), "eval.codes=soft", "--batch", "4,1,4"])
    said = capsys.readouterr()
    assert f"written: {run}" in said.out and f"predict {run} PHOTOS eval.codes=soft --out" in said.err + said.out
    found = find_packages(load_checkpoint(run, ["eval.codes=soft"]), torch.device("cpu"))
    assert found is not None and found.files.keys() == {1, 4}
