"""Reads YAML files into plain trees, with limits on size, depth and aliases. Independent of the schema.

Error messages never quote a file's content: the path may be a link to a file of secrets.
"""

from __future__ import annotations

import copy
import functools
import io
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uvim_fsq.errors import UserError

Tree = dict[str, Any]

MAX_BYTES = 1_000_000
#: Nested lists and mappings. YAML readers are recursive; the one in C crashes when nested too deeply.
MAX_DEPTH = 50
#: Entries after all aliases are expanded.
MAX_ENTRIES = 100_000
#: Builds plain values only; written in C where it is there.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_tree(path: Path) -> Tree:
    """The keys and values of a YAML file. Raises UserError naming the file (and the line, if known) otherwise."""
    return _read(path, _load)


def skim_tree(path: Path) -> Tree:
    """Like `read_tree` and several times as fast, for many files that this package wrote.

    Of two equal keys the last one counts, and numbers written as 1e-3 stay text.
    """
    return _read(path, lambda text: yaml.load(text, Loader=LOADER) or {})


def _load(text: bytes) -> Any:
    return copy.deepcopy(_parsed(text))


@functools.lru_cache(maxsize=16)  # a command reads the same files several times, which takes a quarter of a second
def _parsed(text: bytes) -> Any:
    # Unlike yaml.safe_load, OmegaConf's loader refuses duplicate keys and reads 1e-3 as a number.
    loaded = OmegaConf.load(io.StringIO(text.decode()), max_yaml_expanded_nodes=MAX_ENTRIES)
    return OmegaConf.to_container(loaded, resolve=False)


def _read(path: Path, load: Callable[[bytes], Any]) -> Tree:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path} is longer than {MAX_BYTES} bytes; it cannot be a configuration")
        _check_shape(path, text)
        tree = load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'it is not a text file'}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise UserError(f"{path} is not valid YAML: {_problem(error)} in {where}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid YAML: it holds characters or numbers that cannot be read") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0][:100]}") from error
    return typing.cast(Tree, tree)


def _check_shape(path: Path, text: bytes) -> None:
    """Refuses anything but a mapping, and deep nesting, from the event stream, without recursion."""
    depth = 0
    started = False
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.NodeEvent) and not started:
            if not isinstance(event, yaml.MappingStartEvent):
                raise UserError(f"{path} must hold keys and values")
            started = True
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise UserError(f"{path} is nested more than {MAX_DEPTH} levels deep; it cannot be a configuration")


def _problem(error: yaml.MarkedYAMLError) -> str:
    """The parser's message without quotes from the file (only a duplicate key is named, if it is a single word)."""
    problem = " ".join(str(error.problem or error.context or "broken").split()).split(". ")[0]
    problem = re.sub(r"'[^']*\w[^']*'", "'...'", problem)
    return (
        problem
        if re.fullmatch(r"(found duplicate key [\w.-]{1,40}|(?!found duplicate key).{1,100})", problem)
        else "broken"
    )
