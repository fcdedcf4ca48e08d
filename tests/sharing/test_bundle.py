from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from uvim_fsq.checkpoints.hub import leads_outside
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.portable import portable_config
from uvim_fsq.checkpoints.run_directory import checkpoints, weights_hash
from uvim_fsq.errors import UserError
from uvim_fsq.sharing.bundle import make_bundle


def result(checkpoint: Path, **changes: object) -> dict[str, object]:
    """An evaluation of a checkpoint, as `uvim-fsq evaluate` writes it."""
    return {
        "task": "nyu_depth",
        "protocol": "nyu_depth/full",
        "main_metric": "rmse",
        "data": {"root": "/home/ann/nyu", "split": "val"},
        "images": 6,
        "limit": None,
        "figures": {"oracle": {"rmse": 0.25}},
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": weights_hash(checkpoint),
        "versions": {},
        **changes,
    }


@pytest.fixture
def evaluated(random_runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the oracle's run with three evaluations, one of them of other weights."""
    run = shutil.copytree(random_runs[0], tmp_path / "oracle")
    checkpoint = checkpoints(run)[-1]
    tuned = {"decoding_from": "tuned on val of /home/ann/rooms, 5 images"}
    limited = result(checkpoint, overrides={"eval.limit": [None, 2]}, limit=2, **tuned)
    (run / "evaluation.json").write_text(json.dumps(result(checkpoint)))
    (run / "evaluation_limit-2.json").write_text(json.dumps(limited))
    (run / "evaluation_old.json").write_text(json.dumps(result(checkpoint, checkpoint_sha256="0" * 64)))
    return run


def test_an_uploaded_lm_is_complete_by_itself(uploads: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(uploads / "lm", tmp_path / "elsewhere")
    loaded = load_checkpoint(moved)
    assert loaded.lm is not None and loaded.checkpoint == moved


def test_an_upload_has_no_trainer_state(uploads: Path) -> None:
    names = {str(file.relative_to(uploads / "lm")) for file in (uploads / "lm").rglob("*") if file.is_file()}
    own = {"config.yaml", "model.safetensors", "sha256.json"}
    assert names == own | {f"oracle/{name}" for name in own} | {"README.md"}


def test_an_upload_names_no_path_of_this_machine(uploads: Path) -> None:
    for file in (*uploads.rglob("*.yaml"), *uploads.rglob("*.json"), *uploads.rglob("*.md")):
        assert str(uploads.parent) not in file.read_text() and "/tmp/" not in file.read_text()


@pytest.mark.parametrize(
    ("root", "expected"),
    [("/home/ann/nyu", "nyu"), ("C:\\data\\nyu", "nyu"), ("../nyu", "nyu"), ("sets/nyu", "sets/nyu"), ("~ann", "ann")],
)
def test_of_a_path_the_last_part_is_kept(root: str, expected: str) -> None:
    found = portable_config({"data": {"root": root}, "oracle": "/x/runs/o", "train": {"out": "/x", "resume": "/x/y"}})
    assert found == {"data": {"root": expected}, "oracle": "oracle", "train": {"out": "", "resume": "no"}}
    assert not leads_outside(expected)


def test_evaluations_of_these_weights_are_uploaded(evaluated: Path) -> None:
    found = make_bundle(evaluated).results
    assert [item["limit"] for item in found] == [None, 2]
    assert found[1]["decoding_from"] == "tuned on val of rooms, 5 images"
    assert found[0]["checkpoint"] == checkpoints(evaluated)[-1].name and found[0]["data"]["root"] == "nyu"


def test_results_of_an_upload_that_are_no_list_are_left_out(uploads: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(uploads / "oracle", tmp_path / "copy")
    (copy / "results.json").write_text('{"evaluations": 3}')
    assert make_bundle(copy).results == []


def test_tuned_settings_are_uploaded_for_their_weights_only(random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(random_runs[1], tmp_path / "lm")
    checkpoint = checkpoints(run)[-1]
    sampling = {"temperature": 0.0, "top_k": None, "top_p": None, "steps": None, "choice_temperature": 0.0}
    settings = {"codes": "soft", "code_scale": 0.7, "context_weight": 0.0, "samples": 1, **sampling}
    record = {"settings": settings, "split": "holdout", "other_root": "", "images": 5, "metric": "rmse"}
    file = checkpoint / "decoding.json"
    file.write_text(json.dumps({**record, "checkpoint_sha256": weights_hash(checkpoint), "checkpoint": "/home/ann"}))
    uploaded = make_bundle(run).files["decoding.json"]
    assert isinstance(uploaded, bytes) and json.loads(uploaded)["checkpoint"] == "ann"
    file.write_text(json.dumps({**record, "checkpoint_sha256": "0" * 64}))
    with pytest.raises(UserError, match="tuned for another checkpoint"):
        make_bundle(run)


def test_damaged_weights_are_not_uploaded(random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(random_runs[0], tmp_path / "oracle")
    file = checkpoints(run)[-1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        make_bundle(run)


def test_the_uploaded_configuration_is_read_like_any_other(uploads: Path) -> None:
    tree = yaml.safe_load((uploads / "lm" / "config.yaml").read_text())
    assert (tree["oracle"], tree["train"]["out"], tree["data"]["root"]) == ("oracle", "", "h5")
