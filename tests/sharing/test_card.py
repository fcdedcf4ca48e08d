from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from uvim_fsq.config.schema import Ancestor
from uvim_fsq.errors import UserError
from uvim_fsq.sharing.bundle import Bundle, make_bundle
from uvim_fsq.sharing.card import model_card

RESULT = {
    "protocol": "nyu_depth/full",
    "data": {"root": "nyu", "split": "val"},
    "images": 654,
    "limit": 100,
    "figures": {"oracle": {"rmse": 0.155}, "lm": {"rmse": 0.46312, "delta1": 0.9}},
    "overrides": {"eval.codes": ["hard", "soft"]},
    "decoding": {"codes": "soft", "steps": None},
    "decoding_from": "tuned on holdout, 5 images",
}


@pytest.fixture(scope="module")
def bundle(random_runs: tuple[Path, Path]) -> Bundle:
    return replace(make_bundle(random_runs[1]), results=[RESULT])


def test_figures_stand_beside_their_protocol_split_and_count(bundle: Bundle) -> None:
    card = model_card(bundle, "ann/depth", None)
    assert "**nyu_depth/full**, 654 images, the first 100 only (root nyu, split val)." in card
    assert "|  | oracle | lm |\n| --- | ---: | ---: |\n| rmse | 0.1550 | 0.4631 |\n| delta1 |  | 0.9000 |" in card
    assert "eval.codes=soft (trained with hard)" in card and "Decoding (tuned on holdout, 5 images): codes soft" in card


def test_the_card_states_seed_data_and_hashes(bundle: Bundle) -> None:
    card = model_card(bundle, "ann/depth", None)
    assert "| seed | 0 |" in card and "h5, trained on split train, reported on val" in card
    assert bundle.weights in card and str(bundle.oracle) in card


def test_the_card_names_what_a_run_started_from(bundle: Bundle) -> None:
    ancestor = Ancestor("hub:bob/base@c0ffee", "ab12", "nyu", "train", "")
    card = model_card(replace(bundle, run=replace(bundle.run, ancestors=(ancestor,))), "ann/depth", None)
    assert "| started from | hub:bob/base@c0ffee (SHA-256 of its weights ab12) |" in card


@pytest.mark.parametrize(("given", "field"), [("apache-2.0", "apache-2.0"), (None, "unknown")])
def test_the_license_is_a_field_of_the_card(bundle: Bundle, given: str | None, field: str) -> None:
    card = model_card(bundle, "ann/depth", given)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == field and header["tags"] == ["uvim-fsq", "nyu_depth", "stage-lm"]
    assert ("The author has stated no license." in card) == (given is None)


@pytest.mark.parametrize("damage", [{"figures": 3}, {"figures": {"lm": {"rmse": "x"}}}, {"overrides": {"a": 1}}])
def test_a_damaged_evaluation_is_one_line(bundle: Bundle, damage: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"one of its evaluations is damaged .*evaluate again"):
        model_card(replace(bundle, results=[{**RESULT, **damage}]), "ann/depth", None)


def test_text_cannot_break_out_of_the_card(bundle: Bundle) -> None:
    hostile = {**RESULT, "protocol": "<script>x</script>\n---\n# [a](http://b)|c`d"}
    card = model_card(replace(bundle, results=[hostile]), "ann/depth", None)
    assert "<script>" not in card and "\\[a\\](http://b)\\|c\\`d" in card and "\n# \\[" not in card
