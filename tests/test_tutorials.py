"""The commands of docs/tutorials, run in small: those on synthetic data as they stand, the others up to their data."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from uvim_fsq.cli import main
from uvim_fsq.evaluation.intervals import resampled
from uvim_fsq.tasks.configuration import load_run

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
REAL = "## With real data"
#: What makes a model and its training tiny.
TINY = [
    *("optim.warmup_steps=0", "train.steps=1", "train.batch_size=2", "eval.batch_size=2"),
    *("model.width=16", "model.num_heads=2", "model.mlp_dim=32"),
]
TINY_OF = {
    "train-oracle": [
        *("data.image_size=16", "model.patch_size=4", "model.code_length=4"),
        *("model.encoder_depth=1", "model.decoder_depth=1"),
    ],
    "train-lm": [
        *("model.depth=1", "model.encoder.width=16", "model.encoder.depth=1"),
        *("model.encoder.num_heads=2", "model.encoder.mlp_dim=32"),
    ],
}


def commands(text: str) -> list[list[str]]:
    """The arguments of each `uvim-fsq` of the code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("uvim-fsq ")]


def in_small(arguments: list[str]) -> list[str]:
    """The same command with four scenes, or with a tiny model."""
    if arguments[0] == "synth":
        few = {"--num": "4", "--num-val": "2", "--size": "24"}
        changed = [few.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
        return [*changed, "--workers", "1"]
    if arguments[:2] == ["data", "view"]:
        return [*arguments, "--num", "1"]
    return [*arguments, *TINY, *TINY_OF[arguments[0]]] if arguments[0] in TINY_OF else arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_leads_from_data_to_predictions(
    page: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thousand resamples for each interval would take as long as the rest.
    assert resampled.__kwdefaults__
    monkeypatch.setitem(resampled.__kwdefaults__, "resamples", 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UVIM_FSQ_DATA", raising=False)
    run = commands(page.read_text().partition(REAL)[0])
    assert [words[0] for words in run if words[0] in TINY_OF] == ["train-oracle", "train-lm"]
    for words in run:
        main(in_small(words))
    for words in run:
        for option in {"--out", "--report"} & {*words}:
            assert Path(words[words.index(option) + 1]).exists(), words
        for out in (word.removeprefix("train.out=") for word in words if word.startswith("train.out=")):
            assert (Path(out) / "evaluation.json").is_file()
    found = json.loads(Path("predictions/predictions.json").read_text())
    assert found and not any("error" in entry for entry in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_recipes_for_real_data_are_shipped_and_take_the_settings(page: Path) -> None:
    run = [words for words in commands(page.read_text().partition(REAL)[2]) if words[0] in TINY_OF]
    assert run
    for _, recipe, *settings in run:
        assert load_run(recipe, settings).train.out.startswith("runs/")
