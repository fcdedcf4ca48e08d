"""The tests' own layout: folders like the package's, shared helpers in tests/support, golden numbers in their files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS, PACKAGE = ROOT / "tests", ROOT / "uvim_fsq"
#: Modules that read golden numbers; only files named test_golden_*.py may import them.
GOLDEN_MODULES = ("tests.support.golden", "tests.support.golden_models")
GOLDEN_VARIABLE = "UVIM_FSQ_" + "GOLDEN"


def imported(file: Path) -> Iterator[str]:
    """Modules of the tests that a file imports, wherever in the file the statement is."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tests")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module and node.module.split(".")[0] == "tests":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(file: Path) -> list[str]:
    """Imports from test modules or from a conftest."""
    return [name for name in imported(file) if not name.startswith("tests.support.")]


def reads_golden_numbers(file: Path) -> bool:
    """Whether a file imports the golden numbers or names the variable that moves them."""
    modules = any(
        name == module or name.startswith(module + ".") for name in imported(file) for module in GOLDEN_MODULES
    )
    return modules or GOLDEN_VARIABLE in file.read_text(encoding="utf-8")


def may_read_golden_numbers(file: Path) -> bool:
    return file.name.startswith("test_golden_") or (file.parent.name == "support" and file.name.startswith("golden"))


@pytest.mark.slow
def test_no_test_module_imports_another() -> None:
    found = {str(file.relative_to(TESTS)): names for file in TESTS.rglob("*.py") if (names := wrong_imports(file))}
    assert not found


@pytest.mark.slow
def test_golden_numbers_are_read_only_in_files_that_say_so() -> None:
    found = [file for file in TESTS.rglob("*.py") if reads_golden_numbers(file) and not may_read_golden_numbers(file)]
    assert not found


def test_folders_mirror_the_package() -> None:
    folders = [file for file in TESTS.rglob("*") if file.is_dir() and any(file.glob("test_*.py"))]
    assert not [folder for folder in folders if not (PACKAGE / folder.relative_to(TESTS)).is_dir()]
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        ("from tests.support.small import LM", False),
        ("from tests.lm.test_sampling import helper", True),
        ("def f():\n    import tests.test_layout", True),
        ("from tests.conftest import data", True),
        ("import numpy", False),
    ],
)
def test_imports_of_test_modules_are_found(tmp_path: Path, statement: str, wrong: bool) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(statement)
    assert bool(wrong_imports(file)) == wrong


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("from tests.support.golden import golden", True),
        ("from tests.support import golden_models", True),
        (f"import os\nos.environ['{GOLDEN_VARIABLE}']", True),
        ("from tests.support.small import LM", False),
    ],
)
def test_uses_of_golden_numbers_are_found(tmp_path: Path, text: str, reads: bool) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(text)
    assert reads_golden_numbers(file) == reads
