"""The report about installation and machine: complete, without private data, and honest about what is broken."""

from __future__ import annotations

import getpass
import json
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from uvim_fsq.cli import main
from uvim_fsq.commands import doctor


def test_a_sound_installation_is_described_and_nothing_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == []
    assert {"package", "libraries", "extras", "gpu", "compiler", "processor", "memory", "disk", "data", "hub"} <= set(
        found
    )
    assert found["package"]["Python"] == platform.python_version() and "torch" in found["libraries"]
    assert found["processor"]["cores"] >= 1 and found["memory"]["free shared GB"] >= 0


def test_names_paths_and_tokens_are_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "ada"
    (home / "data" / "secret_project").mkdir(parents=True)
    (home / "data" / "nyudepthv2").mkdir()
    for name, value in {
        "HOME": home,
        "UVIM_FSQ_DATA": home / "data",
        "HF_TOKEN": "hf_secret",
        "LOGNAME": "ada",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("UVIM_FSQ_CACHE", "/tmp/ada/cache")
    monkeypatch.setattr(platform, "node", lambda: "lovelace")
    main(["doctor"])
    text = capsys.readouterr().out
    assert "in ~/data, there yes, found nyudepthv2" in text and "/tmp/USER/cache" in text
    assert getpass.getuser() == "ada"
    for word in ("ada", "secret", "lovelace"):
        assert word not in text.replace("adafactor", ""), word


def test_a_missing_requirement_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def version(name: str) -> str:
        if name == "einops":
            raise PackageNotFoundError(name)
        return {"timm": "0.1"}.get(name, "9999")

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: ["einops>=0.8", "timm>=1.0.20", "wandb; extra == 'wandb'"])
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    text = capsys.readouterr().out
    assert caught.value.code == 1 and "2 thing(s) broken" in text
    assert "broken: einops is not installed; pip install 'einops>=0.8'" in text
    assert "broken: timm 0.1 does not fit timm>=1.0.20" in text


def test_a_library_that_cannot_be_imported_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("no_such_library",))
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "no_such_library cannot be imported (ModuleNotFoundError" in capsys.readouterr().out


def test_what_only_some_need_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "LOW_SHARED", 1e9)
    monkeypatch.delenv("CXX", raising=False)
    main(["doctor"])
    text = capsys.readouterr().out
    assert "warning: no C++ compiler" in text and "warning: /dev/shm has" in text and "nothing is broken" in text


def test_a_part_that_cannot_be_asked_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(report: doctor.Report) -> doctor.Facts:
        raise RuntimeError("driver\nis odd")

    monkeypatch.setattr(doctor, "_gpus", fail)
    main(["doctor"])
    text = capsys.readouterr().out
    assert "warning: gpu: cannot be determined (RuntimeError: driver is odd)" in text and "processor: cores" in text


def test_a_system_that_does_not_describe_itself_hides_no_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_file() -> dict[str, str]:
        raise OSError("no os-release")

    monkeypatch.setattr(platform, "freedesktop_os_release", no_file)
    main(["doctor"])
    assert f"Python {platform.python_version()}" in capsys.readouterr().out


def test_an_extra_for_other_versions_of_python_is_not_called_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ['aim; python_version < "3" and extra == "aim"'])
    assert "aim" in doctor._extras(doctor.Report())["missing"]
