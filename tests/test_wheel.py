"""The wheel holds everything that a user without a clone needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: A few steps of the quickstart's smallest job.
FEW_STEPS = ["--scenes", "24", "train.steps=3", "optim.warmup_steps=1", "train.batch_size=8", "train.log_every=1"]


def run(*command: str | Path, folder: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel and borrows only the dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # A copy: building leaves files in the source folder, and takes over what earlier builds have left there.
    for name in ("uvim_fsq", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, folder=folder)
    (wheel,) = folder.glob("uvim_fsq-*.whl")
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel, folder=folder)
    own = next((environment / "lib").glob("python*/site-packages"))
    # A folder named in a .pth file is searched, but its own .pth files, such as that of an editable install, are not.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import uvim_fsq; print(uvim_fsq.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent), "the wheel is tested, not the clone"
    run(installed / "uvim-fsq", "quickstart", *FEW_STEPS, "--out", "quick", folder=tmp_path)
    assert (tmp_path / "quick" / "report.html").is_file() and (tmp_path / "quick" / "lm" / "evaluation.json").is_file()


@pytest.mark.slow
def test_shipped_configurations_are_found_by_name_from_any_folder(installed: Path, tmp_path: Path) -> None:
    for name in ("nyu_depth/oracle", "configs/nyu_depth/oracle.yaml"):
        printed = run(installed / "uvim-fsq", "config", name, folder=tmp_path)
        assert "name: nyu_depth" in printed and "patch_size: 16" in printed
    shipped = {file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*.yaml")}
    code = "from uvim_fsq.config.shipped import shipped_names; print(*shipped_names())"
    names = run(installed / "python", "-c", code, folder=tmp_path).split()
    assert {f"{name}.yaml" for name in names} == shipped and len(names) > 30


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_marker_of_types(installed: Path) -> None:
    package = next((installed.parent / "lib").glob("python*/site-packages/uvim_fsq"))
    expected = {file.relative_to(ROOT / "uvim_fsq") for file in (ROOT / "uvim_fsq").rglob("*.py")}
    assert {file.relative_to(package) for file in package.rglob("*.py")} == expected
    assert (package / "py.typed").is_file()
