"""Prints docs/configuration.md: every configuration key with its type, default and meaning.

python tools/configuration_reference.py > docs/configuration.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from uvim_fsq.config.parse import describe_keys
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.tasks.registry import BUILT_IN, config_class

INTRODUCTION = """\
# Configuration reference

Every key can stand in a YAML file, nested, or on the command line as `key=value`, dotted. A file holds only what
differs from these defaults; it may name another with `extends:`, a path relative to itself or the name of a shipped
configuration such as `nyu_depth/oracle`. `uvim-fsq config FILE key=value ...` prints the result.

Written by `python tools/configuration_reference.py > docs/configuration.md`; a test compares the two.
"""


def table(rows: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """A Markdown table of (key, type, default, meaning)."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, kind, default, meaning in rows:
        text = " ".join(meaning.split()).replace("|", "\\|")
        default = {"": "(empty)", "None": "null", "True": "true", "False": "false"}.get(default, default)
        kind = re.sub(r"\b(an?|the) ", "", kind)
        lines.append(f"| `{key}` | {kind} | `{default}` | {text} |")
    return [*lines, ""]


def main() -> None:
    """Prints the whole page."""
    oracle, lm = ({row[0]: row for row in describe_keys(cls)} for cls in (OracleRun, LMRun))
    lines = [INTRODUCTION, "## Both stages", ""]
    lines += table(row for key, row in oracle.items() if lm.get(key) == row)
    for title, own, other in (("Stage I: the oracle", oracle, lm), ("Stage II: the token model", lm, oracle)):
        lines += [f"## {title}", ""]
        lines += table(row for key, row in own.items() if other.get(key) != row)
    for name in sorted(BUILT_IN):
        lines += [f"## Task `{name}`", ""]
        lines += table(describe_keys(config_class(name), "task."))
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
