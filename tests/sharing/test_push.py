"""Uploads to a hub on this machine, by plain LFS."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import failure
from tests.support.hub import FakeHub
from uvim_fsq.checkpoints.hub import local_run
from uvim_fsq.checkpoints.run_directory import weights_hash
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.sharing.push import check_request, push, write_folder


@pytest.fixture
def token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, for a user who may write."""
    hub.token = "hf_writes"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.mark.slow
def test_what_was_pushed_comes_back(
    token: FakeHub, random_runs: tuple[Path, Path], uploads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(random_runs[1]), "ann/lm", "--license", "mit", "--private"])
    name = capsys.readouterr().out.split("pushed: ")[1].split()[0]
    assert weights_hash(local_run(name)) == weights_hash(uploads / "lm") and token.private["ann/lm"]
    assert b"license: mit" in token.repos["ann/lm"]["main"]["README.md"]


def test_a_second_push_replaces_the_first(token: FakeHub, random_runs: tuple[Path, Path]) -> None:
    push(random_runs[1], "ann/run")
    name = push(random_runs[0], "ann/run")
    assert name == f"hub:ann/run@{token.sha('ann/run', 'main')}"
    assert set(token.repos["ann/run"]["main"]) == {
        ".gitattributes",
        "README.md",
        "config.yaml",
        "model.safetensors",
        "sha256.json",
    }


def test_a_repository_of_something_else_is_left_alone(token: FakeHub, random_runs: tuple[Path, Path]) -> None:
    before = token.commit("ann/other", {"README.md": b"mine", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match=r"holds something else already \(pytorch_model.bin\)"):
        push(random_runs[0], "ann/other")
    assert token.sha("ann/other", "main") == before


def test_a_folder_cannot_be_private(
    random_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, "push", random_runs[0], "ann/run", "--private", "--folder", tmp_path / "out")
    assert "--folder uploads nothing" in said and not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_asked(
    hub: FakeHub, random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs a token of the hub" in failure(capsys, "push", random_runs[0], "ann/oracle")
    assert not hub.calls


def test_a_wrong_token_is_one_line(
    token: FakeHub, random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match=r"push to ann/oracle: .* token .*hf auth login"):
        push(random_runs[0], "ann/oracle")


@pytest.mark.parametrize("repo", ["depth", "a/b/c", "../x", "a/b@main", "hub:a/b"])
def test_a_repository_has_an_owner_and_a_name(repo: str) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        check_request(repo, None)


def test_a_license_is_an_identifier() -> None:
    with pytest.raises(UserError, match="--license 'MIT: yes"):
        check_request("a/b", "MIT: yes\nx: 1")


def test_an_upload_can_be_looked_at_first(random_runs: tuple[Path, Path], uploads: Path, tmp_path: Path) -> None:
    main(["push", str(random_runs[0]), "ann/oracle", "--folder", str(tmp_path / "new")])
    assert (tmp_path / "new" / "README.md").read_bytes() == (uploads / "oracle" / "README.md").read_bytes()
    with pytest.raises(UserError, match="is there already and not an empty folder"):
        write_folder(random_runs[0], "ann/oracle", tmp_path / "new")
