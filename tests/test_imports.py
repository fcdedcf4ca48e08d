"""Rooms import downwards only: no circle, no arrow upward, lazy and type-checking imports included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import uvim_fsq

PACKAGE = Path(uvim_fsq.__file__).parent
#: From top to bottom: a room may import itself and the rooms below it. docs/architecture.md shows the same order.
ORDER = [
    "__main__",
    "__init__",
    "cli",
    "commands",
    "demo",
    "experiments",
    "benchmark",
    "interop",
    "sharing",
    "training",
    "reports",
    "evaluation",
    "inference",
    "checkpoints",
    "direct",
    "lm",
    "oracle",
    "tasks",
    "synthetic",
    "data",
    "performance",
    "config",
    "layers",
    "compilation",
    "processes",
    "files",
    "console",
    "version",
    "errors",
]
#: Modules that may stand next to the folders, besides `__init__` and `__main__`.
MOST_MODULES = 8


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def is_package(module: str, modules: set[str]) -> bool:
    """Packages are named in strings for other reasons, such as the group of entry points."""
    return any(other.startswith(f"{module}.") for other in modules)


def imported(file: Path, modules: set[str]) -> Iterator[str]:
    """Every module of the package that a file imports or names in a string, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "uvim_fsq")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module and node.module.split(".")[0] == "uvim_fsq":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in modules else node.module
        elif isinstance(node, ast.Constant) and node.value in modules and not is_package(node.value, modules):
            yield node.value  # for importlib


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    files = {module_name(file): file for file in sorted(package.rglob("*.py"))}
    known = set(files)
    edges = {name: set(imported(file, known)) - {name} for name, file in files.items()}
    for name, targets in edges.items():
        edges[name] = {"uvim_fsq.__init__" if target == "uvim_fsq" else target for target in targets}
    return edges


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(module) for module in graph()} == set(ORDER)


def test_the_documentation_shows_the_same_order() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"```order\n(.*?)```", page, re.DOTALL)
    assert [line.partition(":")[0] for line in block.splitlines()] == ORDER[2:]


def test_no_import_goes_upward() -> None:
    upward = [
        f"{source} imports {target}"
        for source, targets in graph().items()
        for target in targets
        if ORDER.index(room(source)) > ORDER.index(room(target))
    ]
    assert not upward, "\n".join(upward)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    edges, done, path = graph(), set[str](), list[str]()

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(edges[module]):
            visit(target)
        done.add(path.pop())

    for module in edges:
        visit(module)


def test_few_modules_stand_next_to_the_folders() -> None:
    beside = [file.stem for file in PACKAGE.glob("*.py") if not file.stem.startswith("__")]
    assert len(beside) <= MOST_MODULES, beside


def test_the_walk_sees_lazy_imports_those_for_types_and_those_by_name(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from uvim_fsq.cli import main\n"
        "def f():\n    import uvim_fsq.training.loop as loop\n    from uvim_fsq.data import loader\n"
        "    importlib.import_module('uvim_fsq.lm.base')\n"
    )
    known = {"uvim_fsq.cli", "uvim_fsq.training.loop", "uvim_fsq.data.loader", "uvim_fsq.data", "uvim_fsq.lm.base"}
    assert set(imported(file, known)) == known - {"uvim_fsq.data"}
