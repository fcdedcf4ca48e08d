"""Runs named hub:OWNER/NAME@REVISION, against a hub on this machine that answers what huggingface_hub asks."""

from __future__ import annotations

import errno
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.cli import failure
from tests.support.hub import FakeHub
from tests.support.runs import sign
from uvim_fsq.checkpoints import hub as hub_cache
from uvim_fsq.checkpoints import hub_client
from uvim_fsq.checkpoints.hub import (
    RECORD,
    is_hub,
    local_run,
    parse,
    provenance_name,
    refuse_downloaded,
    results_folder,
)
from uvim_fsq.checkpoints.run_directory import choose, file_hash, resume_from
from uvim_fsq.cli import main
from uvim_fsq.config import plugins
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json
from uvim_fsq.inference.predictor import Predictor

PHOTO = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)
Usage = namedtuple("Usage", "total used free")


def downloads(hub: FakeHub) -> list[str]:
    return [call for call in hub.calls if call.startswith("GET") and "/resolve/" in call]


def edited(folder: Path, copy: Path, **changes: object) -> Path:
    """A copy of an upload with other keys in its configuration, signed."""
    shutil.copytree(folder, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**tree, **changes}))
    sign(copy)
    return copy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:ann/depth", ("ann", "depth", "main")),
        ("hub:ann/depth@v1.0", ("ann", "depth", "v1.0")),
        ("hub:ann/depth@refs/pr/2", ("ann", "depth", "refs/pr/2")),
    ],
)
def test_a_name_has_owner_name_and_revision(text: str, expected: tuple[str, ...]) -> None:
    assert is_hub(text) and parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hub:", "hub:depth", "hub:../x", "hub:a/..", "hub:a/b@../c", "hub:a/b@", "hub:a/b/c", "hub:a/b\n", "hub:a/b@c//d"],
)
def test_other_names_are_refused_before_anything_is_asked(hub: FakeHub, text: str) -> None:
    with pytest.raises(UserError, match="not of the form hub:OWNER/NAME@REVISION"):
        local_run(text)
    assert not hub.calls


@pytest.mark.slow
def test_a_predictor_from_a_hub_predicts_what_the_run_predicts(
    hub: FakeHub, uploads: Path, random_runs: tuple[Path, Path]
) -> None:
    commit = hub.add_folder("ann/lm", uploads / "lm")
    found = Predictor.from_run("hub:ann/lm")
    expected = Predictor.from_run(random_runs[1])
    np.testing.assert_array_equal(found.predict(PHOTO), expected.predict(PHOTO))
    assert found.provenance["checkpoint"] == f"hub:ann/lm@{commit}"


def test_a_download_is_recorded_with_commit_and_hashes(hub: FakeHub, uploads: Path) -> None:
    commit = hub.add_folder("ann/lm", uploads / "lm")
    folder = local_run("hub:ann/lm@main")
    record = read_json(folder / RECORD, "")
    assert (folder.name, record["commit"], record["revision"], record["hub"]) == (commit, commit, "main", hub.address)
    assert record["files"]["model.safetensors"]["sha256"] == file_hash(uploads / "lm" / "model.safetensors")
    assert choose("hub:ann/lm")[0] == folder and provenance_name(folder) == f"hub:ann/lm@{commit}"


def test_downloaded_files_cannot_be_written(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    folder = local_run("hub:ann/oracle")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
    assert modes == {0o444} and not list(folder.parent.glob(".tmp_*"))


def test_only_the_expected_files_are_fetched(hub: FakeHub, uploads: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uploads / "oracle", tmp_path / "more")
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add_folder("ann/more", folder)
    found = {file.name for file in local_run("hub:ann/more").iterdir()}
    assert found == {"config.yaml", "model.safetensors", "sha256.json", RECORD}


def test_a_commit_in_the_cache_needs_no_network(hub: FakeHub, uploads: Path) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    folder = local_run("hub:ann/oracle")
    hub_cache._found.clear()
    hub.calls.clear()
    assert local_run(f"hub:ann/oracle@{commit}") == folder and not hub.calls


def test_a_cache_of_another_user_is_not_trusted(hub: FakeHub, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    local_run("hub:ann/oracle")
    hub_cache._found.clear()
    monkeypatch.setattr(hub_cache, "owned_by_user", lambda path: False)
    with pytest.raises(UserError, match="belongs to another user; set UVIM_FSQ_CACHE"):
        local_run(f"hub:ann/oracle@{commit}")


def test_a_hub_that_answers_with_another_commit_is_refused(hub: FakeHub, uploads: Path) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    hub.repos["ann/oracle"]["0" * 40] = hub.repos["ann/oracle"]["main"]
    hub.repos["ann/oracle"][f"{'0' * 40}->"] = {commit: b""}
    with pytest.raises(UserError, match=f"answers with another commit, {commit}"):
        local_run(f"hub:ann/oracle@{'0' * 40}")
    assert not downloads(hub)


def test_a_branch_stays_at_its_commit_within_a_process(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/moving", uploads / "oracle")
    first = local_run("hub:ann/moving")
    hub.add_folder("ann/moving", uploads / "lm")
    assert local_run("hub:ann/moving") == first
    hub_cache._found.clear()
    assert local_run("hub:ann/moving") != first


def test_without_connection_a_branch_means_the_commit_of_the_last_download(
    hub: FakeHub, uploads: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    folder = local_run("hub:ann/oracle")
    hub_cache._found.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert local_run("hub:ann/oracle") == folder
    assert "as at the last download" in capsys.readouterr().out


def test_without_connection_an_unknown_run_is_one_line(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = failure(capsys, "evaluate", "hub:ann/nothing")
    assert "http://127.0.0.1:9 cannot be reached" in line and "check the connection" in line


def test_the_network_can_be_forbidden(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        local_run("hub:ann/nothing")
    assert not hub.calls


def test_an_unknown_repository_is_one_line(hub: FakeHub) -> None:
    with pytest.raises(UserError, match="no such repository on http.*hf auth login"):
        local_run("hub:ann/nothing")


def test_an_unknown_revision_is_one_line(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    with pytest.raises(UserError, match="hub:ann/oracle@v9: the repository has no such branch, tag or commit"):
        local_run("hub:ann/oracle@v9")


def test_a_private_repository_asks_for_a_token(hub: FakeHub, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    hub.token = "hf_secret"
    with pytest.raises(UserError, match="or it is private.*HF_TOKEN"):
        local_run("hub:ann/oracle")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert local_run("hub:ann/oracle").is_dir()


def test_an_interrupted_download_is_continued(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    hub.cut.add("model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: .* broke off .* run the same command again"):
        local_run("hub:ann/oracle")
    hub.cut.clear()
    hub.calls.clear()
    assert file_hash(local_run("hub:ann/oracle") / "model.safetensors") == file_hash(
        uploads / "oracle" / "model.safetensors"
    )
    assert len(downloads(hub)) == 1, "the small files were there already"


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(hub: FakeHub, uploads: Path, name: str) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    hub.corrupt.add(name)
    with pytest.raises(UserError, match=f"{name} arrived damaged, its hash differs"):
        local_run("hub:ann/oracle")
    hub.corrupt.clear()
    assert file_hash(local_run("hub:ann/oracle") / name) == file_hash(uploads / "oracle" / name)


def test_a_file_that_was_changed_in_the_cache_is_refused(hub: FakeHub, uploads: Path) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    file = local_run("hub:ann/oracle") / "config.yaml"
    file.chmod(0o644)
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    hub_cache._found.clear()
    with pytest.raises(UserError, match=r"config.yaml is not as it was downloaded; delete .*it is downloaded again"):
        local_run(f"hub:ann/oracle@{commit}")


def test_a_full_disk_is_noticed_before_the_download(
    hub: FakeHub, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 10))
    with pytest.raises(UserError, match=r"takes 0.00 GB, but .* free space, or set UVIM_FSQ_CACHE"):
        local_run("hub:ann/oracle")


def test_a_disk_that_fills_up_during_the_download_is_one_line(
    hub: FakeHub, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(UserError, match="the disk is full; free space"):
        local_run("hub:ann/oracle")


@pytest.mark.parametrize("name", ["../../evil.py", "/etc/passwd", "a\\..\\b", "a\nb", "~/x"])
def test_a_repository_with_names_that_lead_out_is_refused(hub: FakeHub, uploads: Path, name: str) -> None:
    hub.add_folder("ann/evil", uploads / "oracle")
    hub.extra.append(name)
    with pytest.raises(UserError, match="leads out of its folder"):
        local_run("hub:ann/evil")
    assert not downloads(hub)


def test_a_file_that_is_too_large_is_refused_before_it_is_fetched(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/large", uploads / "oracle")
    hub.sizes["config.yaml"] = 1 << 30
    with pytest.raises(UserError, match="config.yaml has 1073741824 bytes, more than such a file can have"):
        local_run("hub:ann/large")
    assert not downloads(hub)


def test_a_repository_of_something_else_is_refused(hub: FakeHub) -> None:
    hub.commit("ann/other", {"README.md": b"hello", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match="has no config.yaml: it was not uploaded by `uvim-fsq push`"):
        local_run("hub:ann/other")


def test_an_lm_without_its_oracle_is_refused(hub: FakeHub, uploads: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uploads / "lm", tmp_path / "half")
    shutil.rmtree(folder / "oracle")
    hub.add_folder("ann/half", folder)
    with pytest.raises(UserError, match="is an LM without its oracle"):
        local_run("hub:ann/half")


@pytest.mark.parametrize("root", ["/home/ann/nyu", "~/nyu", "../nyu", "C:\\nyu"])
def test_paths_of_the_author_are_refused(hub: FakeHub, uploads: Path, tmp_path: Path, root: str) -> None:
    hub.add_folder("ann/paths", edited(uploads / "oracle", tmp_path / "paths", data={"root": root}))
    with pytest.raises(UserError, match=r"data.root in its config.yaml is .* a place on its author's machine"):
        local_run("hub:ann/paths")
    assert not any(call.endswith("model.safetensors") for call in downloads(hub))


@pytest.mark.usefixtures("no_trusted_plugins")
def test_plugins_of_a_repository_are_imported_only_with_trust(
    hub: FakeHub, uploads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_folder("ann/plugin", edited(uploads / "oracle", tmp_path / "plugin", plugins=["strange_plugin"]))
    assert "--trust" in failure(capsys, "evaluate", "hub:ann/plugin")
    assert "strange_plugin" not in plugins._named


def test_results_of_a_downloaded_run_go_elsewhere(hub: FakeHub, uploads: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    assert results_folder("hub:ann/oracle") == Path("runs/hub/ann/oracle", commit[:12])
    assert results_folder(local_run("hub:ann/oracle")) == Path("runs/hub/ann/oracle", commit[:12])
    assert results_folder(tmp_path) == tmp_path


@pytest.mark.slow
def test_evaluate_leaves_the_cache_as_it_was(
    hub: FakeHub, uploads: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "hub:ann/oracle", f"data.root={data}", "--limit", "2"])
    (file,) = (tmp_path / "runs" / "hub" / "ann" / "oracle" / commit[:12]).iterdir()
    assert read_json(file, "")["checkpoint"] == f"hub:ann/oracle@{commit}"
    assert len(list(local_run("hub:ann/oracle").iterdir())) == 4


@pytest.mark.parametrize("command", ["tune", "compile"])
def test_commands_that_write_into_a_run_refuse_a_downloaded_one(
    hub: FakeHub, uploads: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    hub.add_folder("ann/lm", uploads / "lm")
    assert f"is read-only, but {command} writes" in failure(capsys, command, "hub:ann/lm")


def test_a_refusal_to_write_names_a_way(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/lm", uploads / "lm")
    with pytest.raises(UserError, match=r"is read-only, but tune writes .*cp -r .* runs/COPY"):
        refuse_downloaded("hub:ann/lm", "tune writes the settings into the run")


def test_training_cannot_resume_from_a_hub(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no optimizer state to continue from.*init_from=hub:ann/lm"):
        resume_from(tmp_path, "hub:ann/lm")
    assert not hub.calls


def test_a_hub_that_names_no_commit_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "is_commit", lambda revision: False)
    hub.commit("ann/odd", {"config.yaml": b"a: 1"})
    with pytest.raises(UserError, match="does not name the commit"):
        local_run("hub:ann/odd")
