"""From a picture's file to the written result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.paths import CONFIGS
from uvim_fsq.benchmark.predicting import SIZE, write_picture
from uvim_fsq.cli import main


def test_the_pictures_are_as_large_as_photos_and_differ(tmp_path: Path) -> None:
    first, second = (write_picture(tmp_path / f"{seed}.jpg", seed) for seed in (0, 1))
    assert Image.open(first).size == SIZE[::-1] and 40_000 < first.stat().st_size < 200_000
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.slow
def test_the_command_and_a_loaded_model_are_timed(tmp_path: Path, lm_dir: Path) -> None:
    file = tmp_path / "result.json"
    main(["benchmark", "predict", str(lm_dir), "--repeats", "1", "--batch", "1", "2", "--json", str(file)])
    lines = {line["name"]: line for line in json.loads(file.read_text())["measurements"]}
    whole, one, two = (
        f"predict nyu_depth, {row}" for row in ("the whole command, one picture", "warm, batch 1", "warm, batch 2")
    )
    assert list(lines) == [whole, one, two] and lines[two]["unit"] == "images/s"
    # The command also starts Python and imports torch.
    assert lines[whole]["unit"] == "ms" and lines[whole]["value"] > 1000 > 1000 / lines[one]["value"]


@pytest.mark.slow
def test_a_configuration_is_measured_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "nyu_depth" / "small_lm.yaml"
    main(["benchmark", "predict", str(config), "--repeats", "1", "--batch", "1"])
    assert "| predict nyu_depth, warm, batch 1 |" in capsys.readouterr().out
