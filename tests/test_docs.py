"""The documentation agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("examples/*/*.md")]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_configuration_reference_is_the_generated_one() -> None:
    script = ROOT / "tools" / "configuration_reference.py"
    printed = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "configuration.md").read_text(), "run it again: its first lines say how"


def test_code_on_the_page_about_extensions_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "extensions" / "extensions.py").read_text()
    found = blocks(ROOT / "docs" / "extending.md", "python")
    assert len(found) == 2 and all(block.strip() in example for block in found)


def test_code_on_the_page_about_tasks_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "camvid_segmentation" / "camvid_segmentation.py").read_text()
    lines = {line.strip() for line in example.splitlines()}
    pages = blocks(ROOT / "docs" / "your_own_task.md", "python")
    # `adjust` is shown for tasks of directions and distances, which segmentation is not.
    code = [block for block in pages if re.search(r"^ *(class|def) ", block, re.M) and "def adjust" not in block]
    assert code
    unknown = [line for block in code for line in block.splitlines() if line.strip() not in {"", "...", *lines}]
    assert not unknown, unknown


def test_the_readme_lists_every_command() -> None:
    from uvim_fsq.cli import COMMANDS, DATA_COMMANDS

    table = (ROOT / "README.md").read_text().partition("| command |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`([a-z0-9 -]+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert listed == {*COMMANDS, *(f"data {name}" for name in DATA_COMMANDS)} - {"data"}


def test_commands_on_the_pages_are_commands() -> None:
    from uvim_fsq.cli import COMMANDS, DATA_COMMANDS

    for page in PAGES:
        for name, action in re.findall(r"uvim-fsq ([a-z][a-z-]*)(?: ([a-z-]+))?", page.read_text()):
            assert name in COMMANDS or (name == "data" and action in DATA_COMMANDS), f"{page.name}: uvim-fsq {name}"


def test_keys_on_the_pages_are_keys() -> None:
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.config.schema import STAGES

    known = {key for run in STAGES.values() for key, *_ in describe_keys(run)}
    sections = "data|model|optim|train|eval"
    for page in PAGES:
        for key in re.findall(rf"(?<![\w./])((?:{sections})\.[a-z0-9_.]+)=", page.read_text()):
            assert key in known, f"{page.name}: {key}"
