"""Checkpoint directories are written atomically and read strictly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from tests.support.checkpoints import save, steps
from tests.support.runs import sign
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import (
    checked_hash,
    file_hash,
    recorded_hashes,
    resolve_checkpoint,
    step_name,
)
from uvim_fsq.errors import UserError


def test_a_checkpoint_has_these_files_and_loads_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "config.yaml",
        "model.safetensors",
        "sha256.json",
        "trainer/state.pt",
    ]
    assert path == tmp_path / "checkpoints" / "step_00000003"
    assert recorded_hashes(path) == {n: file_hash(path / n) for n in ("config.yaml", ckpt.WEIGHTS, ckpt.STATE)}
    assert (path / "config.yaml").read_text() == "a: 1\n"
    model = nn.Linear(1, 1, bias=False)
    assert ckpt.load_model_weights(model, path) == file_hash(path / ckpt.WEIGHTS) and model.weight.item() == 3
    assert ckpt.load_trainer_state(path) == ({"step": 3}, file_hash(path / ckpt.STATE))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 3)
    assert steps(tmp_path) == [3]


def raising(error: BaseException) -> Callable[..., None]:
    """A function that raises the error."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (torch, "save", OSError(28, "No space left on device")),
        (
            safetensors.torch,
            "save_file",
            SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
        ),
    ],
)
def test_a_full_disk_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: Exception
) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(module, name, raising(error))
    with pytest.raises(UserError, match="step_00000009: the disk is full; earlier checkpoints are intact"):
        save(tmp_path, 9)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("error", "message"), [(RuntimeError("odd\nlines"), "odd; earlier"), (OSError(), r"OSError\(\); earlier")]
)
def test_other_errors_of_saving_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(torch, "save", raising(error))
    with pytest.raises(UserError, match=f"cannot save .*: {message}"):
        save(tmp_path, 9)
    assert steps(tmp_path) == []


def test_a_file_in_place_of_the_checkpoints_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot save .*checkpoints"):
        save(tmp_path, 9)


def test_a_kill_while_saving_leaves_only_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(torch, "save", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 9)
    assert steps(tmp_path) == [3] and (tmp_path / "checkpoints" / ".tmp_step_00000009").is_dir()
    ckpt.clean_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, and the folders that name it, is synced; the folder of checkpoints after the rename."""
    synced: list[str] = []

    def record(path: Path) -> None:
        synced.append(str(path.resolve().relative_to(tmp_path)))
        assert path.exists()

    monkeypatch.setattr(ckpt, "sync", record)
    path = save(tmp_path, 1)
    temporary = "checkpoints/.tmp_step_00000001"
    names = ("config.yaml", "model.safetensors", "trainer/state.pt", "sha256.json", "trainer")
    assert synced == [*(f"{temporary}/{name}" for name in names), temporary, "checkpoints"]
    synced.clear()
    ckpt.copy_checkpoint(path, tmp_path / "run" / "oracle")
    names = ("config.yaml", "model.safetensors", "sha256.json")
    assert synced == [*(f"run/.tmp_oracle/{name}" for name in names), "run"]


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "trainer/state.pt"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, oracle_dir: Path, name: str, damage: str) -> None:
    shutil.copytree(oracle_dir, tmp_path / "run")
    checkpoint = resolve_checkpoint(tmp_path / "run")
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if damage == "flipped" else content[:-100])
    if damage == "gone":
        file.unlink()
    with pytest.raises(UserError, match=name if damage != "gone" else "no |cannot be read") as caught:
        if name == ckpt.STATE:
            ckpt.load_trainer_state(checkpoint)
        else:
            load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    assert damage == "gone" or "is damaged" in str(caught.value)
    assert ("or was edited" in str(caught.value)) == (name == "config.yaml" and damage != "gone")


@pytest.fixture
def own_copy(tmp_path: Path, oracle_dir: Path) -> Path:
    """A checkpoint that a test may edit; `sign` makes it look intact."""
    shutil.copytree(oracle_dir, tmp_path / "run")
    return resolve_checkpoint(tmp_path / "run")


def test_a_checkpoint_without_its_hashes_is_refused(own_copy: Path) -> None:
    (own_copy / ckpt.SUMS).unlink()
    with pytest.raises(
        UserError, match="sha256.json is missing, so damage cannot be ruled out; use another checkpoint"
    ):
        load_checkpoint(own_copy)
    with pytest.raises(UserError, match="sha256.json is missing"):
        ckpt.load_trainer_state(own_copy)


def test_weights_must_fit_the_configuration_whatever_the_hashes_say(tmp_path: Path, own_copy: Path) -> None:
    config = (own_copy / "config.yaml").read_text()
    (own_copy / "config.yaml").write_text(config.replace("levels:\n    - 5\n", "levels:\n    - 5\n    - 7\n"))
    sign(own_copy)
    with pytest.raises(UserError, match="encoder_head.* instead of"):
        load_checkpoint(tmp_path / "run")
    (own_copy / "config.yaml").write_text(config)
    file = own_copy / ckpt.WEIGHTS
    tensors = safetensors.torch.load_file(file)
    first, *others = tensors
    safetensors.torch.save_file({name: tensors[name] for name in others} | {"x": torch.zeros(1)}, file)
    sign(own_copy)
    with pytest.raises(UserError, match=f"missing {first}; unexpected x. Was config.yaml"):
        load_checkpoint(tmp_path / "run")
    safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    sign(own_copy)
    with pytest.raises(UserError, match=f"and {len(tensors) + 1 - 3} more"):
        load_checkpoint(tmp_path / "run")


def test_truncated_files_are_named_whatever_the_hashes_say(own_copy: Path) -> None:
    file = own_copy / ckpt.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    (own_copy / ckpt.STATE).write_bytes(b"nonsense")
    sign(own_copy)
    with pytest.raises(UserError, match="truncated"):
        load_checkpoint(own_copy)
    with pytest.raises(UserError, match="state.pt is broken"):
        ckpt.load_trainer_state(own_copy)


class Harmful:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("harm is done",)


def test_a_trainer_state_is_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ckpt.save_checkpoint(tmp_path, 1, config="", weights={}, state={"x": Harmful()})
    with pytest.raises(UserError, match="state.pt is broken"):
        ckpt.load_trainer_state(path)
    assert "harm" not in capsys.readouterr().out


def test_three_of_many_differences_are_named(tmp_path: Path) -> None:
    path = ckpt.save_checkpoint(tmp_path, 1, config="", weights={"0.weight": torch.zeros(1, 1)}, state={})
    three = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match="missing 0.bias; missing 1.weight; missing 1.bias. Was config.yaml"):
        ckpt.load_model_weights(three, path)
    four = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match="missing 0.bias; missing 1.weight; missing 1.bias and 1 more. Was"):
        ckpt.load_model_weights(four, path)


def test_damaged_sums_are_an_error_of_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    misspelt = (path / "sha256.json").read_text().replace("state.pt", "stale.pt")
    for content in ("{", "[]", "{}", '{"config.yaml": 1, "model.safetensors": "x"}', misspelt):
        (path / "sha256.json").write_text(content)
        with pytest.raises(UserError, match="sha256.json is damaged.*use another checkpoint"):
            checked_hash(path, ckpt.WEIGHTS)


def test_a_copy_is_atomic_and_has_sums(tmp_path: Path) -> None:
    source, target = save(tmp_path / "oracle_run", 1), tmp_path / "run" / "oracle"
    # As an earlier one that was killed leaves it.
    (target.parent / ".tmp_oracle").mkdir(parents=True)
    (target.parent / ".tmp_oracle" / "config.yaml").write_text("half")
    ckpt.copy_checkpoint(source, target)
    assert recorded_hashes(target) == {n: file_hash(source / n) for n in ("config.yaml", ckpt.WEIGHTS)}
    assert [p.name for p in target.parent.iterdir()] == ["oracle"]
    before = (target / ckpt.WEIGHTS).stat().st_ino
    ckpt.copy_checkpoint(source, target)
    assert (target / ckpt.WEIGHTS).stat().st_ino == before, "copied again for nothing"
    (target / "config.yaml").write_text("b: 2\n")
    ckpt.copy_checkpoint(source, target)
    assert (target / "config.yaml").read_text() == "a: 1\n"
    other = save(tmp_path / "oracle_run", 2)
    ckpt.copy_checkpoint(other, target)
    assert file_hash(target / ckpt.WEIGHTS) == file_hash(other / ckpt.WEIGHTS)
    assert [p.name for p in target.parent.iterdir()] == ["oracle"]
    (other / ckpt.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        ckpt.copy_checkpoint(other, tmp_path / "third")


def test_a_kill_while_deleting_leaves_no_partial_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            next(p for p in path.rglob("*") if p.is_file()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ckpt.prune(tmp_path, 1)
    assert steps(tmp_path) == [2]
    save(tmp_path, 1)
    ckpt.prune(tmp_path, 1)
    assert steps(tmp_path) == [2], "leftovers of the kill are in the way"


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    half = tmp_path / "checkpoints" / "step_00000000"
    half.mkdir()
    (half / "config.yaml").write_text("a: 1")
    (tmp_path / ".tmp_oracle").mkdir()
    (tmp_path / "panels").mkdir()
    for leftover in ("panels/.step_00000001.png.7.partial", "checkpoints/step_00000002/.evaluation.json.7.partial"):
        (tmp_path / leftover).write_text("half")
    ckpt.clean_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert not list(tmp_path.rglob(".*")) and steps(tmp_path) == [2]


def test_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        picture = tmp_path / "panels" / f"{step_name(step)}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"")
    assert ckpt.set_aside(tmp_path, 3) == []
    assert [p.name for p in ckpt.set_aside(tmp_path, 1)] == [step_name(2), step_name(3)]
    assert steps(tmp_path) == [1] and [p.name for p in (tmp_path / "panels").iterdir()] == [f"{step_name(1)}.png"]
    save(tmp_path, 3)
    save(tmp_path, 3)
    assert ckpt.set_aside(tmp_path, 1) == [tmp_path / ckpt.SET_ASIDE / f"{step_name(3)}_2"]
    save(tmp_path, 3)
    assert ckpt.set_aside(tmp_path, 1) == [tmp_path / ckpt.SET_ASIDE / f"{step_name(3)}_3"]
    names = sorted(p.name for p in (tmp_path / ckpt.SET_ASIDE).iterdir())
    assert names == [step_name(2), step_name(3), f"{step_name(3)}_2", f"{step_name(3)}_3"]
    assert all((tmp_path / ckpt.SET_ASIDE / name / ckpt.WEIGHTS).is_file() for name in names)
