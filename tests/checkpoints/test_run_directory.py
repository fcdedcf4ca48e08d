"""Which checkpoint of a run is used, kept and resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import HOLDOUT, save, steps
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.run_directory import (
    Evaluation,
    Selection,
    best,
    choose,
    read_evaluation,
    resolve_checkpoint,
    resume_from,
    step_name,
)
from uvim_fsq.errors import UserError


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    for step, value in enumerate((0.9, 0.5, 0.8, 0.5, 0.7), 1):
        save(tmp_path, step, value)
        ckpt.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 4, 5], "the first of equals, and the last two"
    assert choose(tmp_path) == (tmp_path / "checkpoints" / step_name(2), HOLDOUT)
    assert HOLDOUT.describe() == "best rmse on holdout, 10 images"
    assert resolve_checkpoint(tmp_path).name == step_name(2)
    assert resolve_checkpoint(tmp_path, prefer="last").name == step_name(5)
    given = tmp_path / "checkpoints" / step_name(4)
    assert choose(given) == (given, None) and resolve_checkpoint(given, prefer="last") == given


def test_only_evaluations_of_the_same_kind_are_compared(tmp_path: Path) -> None:
    """Neither another number of images, nor another split or protocol; the newest evaluation says which."""
    save(tmp_path, 1, 0.1)
    save(tmp_path, 2, 0.3, Selection("holdout", 4096, "nyu_depth/uvim", "rmse", True))
    assert choose(tmp_path)[0].name == step_name(2)
    save(tmp_path, 3, 0.2, Selection("train", 10, "nyu_depth/uvim", "rmse", True))
    assert choose(tmp_path)[0].name == step_name(3)
    save(tmp_path, 4, 0.4)
    assert choose(tmp_path)[0].name == step_name(1)
    save(tmp_path, 5, 0.4, Selection("val", 10, "nyu_depth/uvim", "", True))
    assert choose(tmp_path) == (tmp_path / "checkpoints" / step_name(5), None), "nothing chooses: the last"


@pytest.mark.parametrize(("smaller", "wanted"), [(True, 2), (False, 3)])
def test_the_best_value_follows_the_metrics_direction_and_is_never_nan(
    tmp_path: Path, smaller: bool, wanted: int
) -> None:
    watch = Selection("holdout", 10, "p", "rmse", smaller)
    save(tmp_path, 1, float("nan"), watch)
    assert best(tmp_path) is None and choose(tmp_path)[0].name == step_name(1)
    for step, value in ((2, 0.2), (3, 0.4), (4, 0.3), (5, float("nan")), (6, float("inf")), (7, float("-inf"))):
        save(tmp_path, step, value, watch)
    assert choose(tmp_path)[0].name == step_name(wanted)


def test_checkpoints_without_an_evaluation_are_not_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.5)
    last = save(tmp_path, 2)
    assert read_evaluation(last) is None and choose(tmp_path)[0].name == step_name(1)
    shutil.rmtree(tmp_path / "checkpoints" / step_name(1))
    assert best(tmp_path) is None and choose(tmp_path) == (last, None)


def test_a_damaged_evaluation_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 0.5)
    assert read_evaluation(path) == Evaluation(HOLDOUT, {"rmse": 0.5, "images": 10.0})
    record = json.loads((path / ckpt.FIGURES).read_text())
    wrong = [{**record, key: value} for key, value in (("images", "10"), ("images", True), ("figures", [1]))]
    wrong += [{k: v for k, v in record.items() if k != key} for key in record]
    wrong += [
        {**record, "figures": {"rmse": "0.5"}},
        {**record, "figures": {"rmse": 0.5, "images": "x"}},
        {**record, "figures": {"images": 3.0}},
    ]
    for content in (b"", b"\xff", b"[1]", *(json.dumps(each).encode() for each in wrong)):
        (path / ckpt.FIGURES).write_bytes(content)
        with pytest.raises(UserError, match="evaluation.json is damaged.*remove it") as caught:
            choose(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        choose(tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no checkpoint"):
        choose(tmp_path)


def test_the_checkpoint_that_train_resume_stands_for(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for how in ("no", "auto"):
        assert resume_from(run, how) is None
    first, _, last, foreign = save(run, 1, 0.1), save(run, 2, 0.2), save(run, 3, 0.3), save(other, 1)
    assert resume_from(run, "auto") == last
    assert resume_from(run, str(run)) == last, "training goes on from the last one, not from the best"
    assert resume_from(run, str(first)) == first
    assert resume_from(tmp_path / "new", str(foreign)) == foreign
    with pytest.raises(UserError, match="already holds checkpoints; continue with train.resume=auto"):
        resume_from(run, "no")
    with pytest.raises(UserError, match="is not one of them; choose another train.out"):
        resume_from(run, str(foreign))
