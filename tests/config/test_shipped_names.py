"""Shipped configurations are found by name; what is not found is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.paths import CONFIGS
from uvim_fsq.cli import main
from uvim_fsq.config import shipped
from uvim_fsq.config.schema import BUILT_IN_QUANTIZERS, BUILT_IN_TOKEN_MODELS
from uvim_fsq.config.shipped import find_config, shipped_folder, shipped_names
from uvim_fsq.errors import UserError
from uvim_fsq.lm.base import TOKEN_MODELS
from uvim_fsq.oracle.quantizers.base import QUANTIZERS


def test_the_folder_is_the_clones_unless_the_package_holds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_folder() == CONFIGS
    module = tmp_path / "uvim_fsq" / "config" / "shipped.py"
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(shipped, "__file__", str(module))
    assert shipped_folder() == tmp_path / "configs"
    (tmp_path / "uvim_fsq" / "configs").mkdir(parents=True)
    assert shipped_folder() == tmp_path / "uvim_fsq" / "configs"


def test_names_are_paths_without_suffix() -> None:
    names = shipped_names()
    assert {"nyu_depth/oracle", "ablations/table2_depth"} <= set(names) and names == sorted(names)
    assert all((CONFIGS / f"{name}.yaml").is_file() for name in names)


@pytest.mark.parametrize("name", ["nyu_depth/oracle", "nyu_depth/oracle.yaml", "configs/nyu_depth/oracle.yaml"])
def test_a_name_finds_the_shipped_file_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / "nyu_depth" / "oracle.yaml"


def test_the_users_own_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nyu_depth").mkdir()
    (tmp_path / "nyu_depth" / "oracle").write_text("stage: oracle\n")
    assert find_config("nyu_depth/oracle") == Path("nyu_depth/oracle")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nyu_depth/oracel", "^nyu_depth/oracel: no such configuration file.*; did you mean nyu_depth/oracle.$"),
        ("qqqq", "^qqqq: no such .*; shipped configurations have names such as nyu_depth/oracle$"),
        ("", "the configuration's name is empty; give a file"),
        ("../../no/such/file", "no such configuration file"),
        (str(CONFIGS / "nyu_depth"), r"nyu_depth is a folder; give one of its files, e.g. .*lm.yaml"),
    ],
)
def test_what_is_not_found_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_config(name)


def test_a_folder_without_configurations_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file, and no shipped configuration of that name"):
        find_config(tmp_path)


def test_a_name_that_is_too_long_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", "y" * 300])
    printed = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and printed.startswith("error: a file name is too long (yyy")
        and printed.count("\n") == 1
    )


def test_an_own_file_extends_a_shipped_one_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("extends: nyu_depth/oracle\nmodel:\n  width: 384\n")
    main(["config", str(tmp_path / "mine.yaml")])
    printed = capsys.readouterr().out
    assert "width: 384" in printed and "encoder_depth: 6" in printed


def test_the_built_in_kinds_are_those_that_the_package_registers() -> None:
    for registry, built_in in ((QUANTIZERS, BUILT_IN_QUANTIZERS), (TOKEN_MODELS, BUILT_IN_TOKEN_MODELS)):
        own = [name for name, entry in registry.entries.items() if entry.__module__.startswith("uvim_fsq.")]
        assert sorted(own) == sorted(built_in)
