"""Converts YAML and `key=value` text to frozen dataclasses, and back. Independent of tasks and torch."""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uvim_fsq.config.schema import DataConfig, LMRun, Run, TaskSection
from uvim_fsq.config.shipped import find_config, shipped_names
from uvim_fsq.config.yaml_files import Tree, read_tree
from uvim_fsq.errors import UserError

#: Keys of `data` that an LM inherits from its oracle unless they are set.
INHERITED = (
    "root",
    "image_size",
    "train_split",
    "eval_split",
    "selection_split",
    "crop",
    "crop_area",
    "hflip",
    "color_jitter",
)


def merge(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, found_in: Path | None = None
) -> tuple[Tree, set[str]]:
    """Merges `key=value` overrides into a configuration file or parsed tree.

    Args:
        source: the path of a YAML file, or its parsed tree.
        overrides: dotted keys with YAML values, e.g. "train.steps=100".
        found_in: the file of a trained run that `source` was read from. It may come from anyone, so it must not refer
            to anything outside itself.

    Returns:
        The merged tree, and the top-level keys of the overrides.

    Raises UserError for overrides that cannot be parsed.
    """
    tree = read_yaml(find_config(source)) if isinstance(source, (str, Path)) else dict(source)
    if found_in is not None:
        _refuse_references(tree, found_in)
    if isinstance(overrides, str):
        raise UserError(f"overrides={short(overrides)} is one text; give a list, [{short(overrides)}]")
    if found_in is not None and not overrides:
        return copy.deepcopy(tree), set()
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError(f"override {short(override)} is not of the form key=value")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(OmegaConf.create(tree), given)
        resolved = OmegaConf.to_container(merged, resolve=True)
    except yaml.YAMLError as error:
        text = short(" ".join(overrides))
        raise UserError(f"one of the overrides {text} is not valid YAML: {_one_line(error)[:300]}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {str(error).splitlines()[0][:300]}") from error
    except RecursionError as error:
        raise UserError(f"one of the overrides {short(' '.join(overrides))} is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"one of the overrides {short(' '.join(overrides))} has a number that is too long") from error
    return typing.cast(Tree, resolved), {str(key) for key in given}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def short(value: Any) -> str:
    """`repr(value)` for messages, truncated to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number with thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse_references(tree: Tree, file: Path) -> None:
    """Refuses `extends` and ${...}, which could copy local files or environment variables into the run's results."""
    if "extends" in tree:
        raise UserError(f"{file} contains `extends`; the configuration of a run must be complete, remove that line")
    todo: list[Any] = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*typing.cast(Tree, value), *typing.cast(Tree, value).values()]
        elif isinstance(value, list):
            todo += typing.cast(list[Any], value)
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"{file} contains ${{...}}, which a run's configuration may not; write the value itself")


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> Tree:
    """Reads a configuration file as a tree, merged onto the file that it extends, if any.

    `children`: the files that led here through `extends`. Raises UserError for anything but keys and values.
    """
    if path.resolve() in children:
        raise UserError(f"{path}: `extends` forms a cycle; remove it from one of the files")
    tree = read_tree(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends={short(parent)} must be the path of one file")
    file = path.parent / parent
    if not file.is_file() and parent in shipped_names():
        file = find_config(parent)
    base = read_yaml(file, (*children, path.resolve()))
    if _task_name(tree) not in (None, _task_name(base)):
        # The base file configures a different task, whose keys do not apply.
        base.pop("task", None)
    try:
        return typing.cast(Tree, OmegaConf.to_container(OmegaConf.merge(base, tree), resolve=False))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0][:300]}") from error


def _task_name(tree: Tree) -> Any:
    task: Any = tree.get("task")
    return typing.cast(Tree, task).get("name") if isinstance(task, dict) else None


def build(cls: type, tree: Any, prefix: str) -> Any:
    """Converts a parsed tree into the frozen dataclass `cls`; `prefix` is the dotted path for messages.

    Raises UserError for unknown keys (with a suggestion), missing keys and wrong types.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.') or 'configuration'}: expected keys and values, got {short(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in settings_of(cls)}
    values: Tree = {}
    for key, value in typing.cast(Tree, tree).items():
        if key not in fields:
            raise UserError(f"unknown key {prefix}{_word(key)}{_did_you_mean(key, fields, prefix)}")
        values[key] = convert(hints[key], value, f"{prefix}{key}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing; set it in the file or as {prefix}{name}=...")
    return cls(**values)


def settings_of(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a configuration dataclass (or an instance) that a user may set."""
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("internal")]


def _word(key: Any) -> str:
    """A key for a message. Text that does not look like a key is not quoted: it may be a line of some other file."""
    return str(key) if re.fullmatch(r"[\w.-]{1,40}", str(key)) else "(not a valid key name)"


def _did_you_mean(key: Any, fields: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(str(key), list(fields), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known keys: {', '.join(fields)}"


def convert(hint: Any, value: Any, key: str) -> Any:
    """Converts `value` to the type `hint`; ints are accepted as floats, and lists as tuples. Raises UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, key, hint)
    if origin is Literal:
        if value is False and "no" in args:
            return "no"  # YAML reads an unquoted no as false
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(f"{key}={short(value)}: must be one of {', '.join(map(str, args))}")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), {} if value is None else value, f"{key}.")
    if origin is tuple:
        return _convert_tuple(args, value, key)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 1 << 63:
            return value
        raise UserError(f"{key}={short(value)}: must fit in 64 bits")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and value is None:
        return ""  # `key=` on the command line
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{key}={short(value)}: must be {_type_name(hint)}{_boolean_hint(value)}")


def _boolean_hint(value: Any) -> str:
    return " (YAML reads yes and on as true, no and off as false)" if isinstance(value, bool) else ""


def _convert_union(args: tuple[Any, ...], value: Any, key: str, hint: Any) -> Any:
    if value is None and type(None) in args:
        return None
    for option in args:
        if option is type(None):
            continue
        try:
            return convert(option, value, key)
        except UserError:
            continue
    raise UserError(f"{key}={short(value)}: must be {_type_name(hint)}{_boolean_hint(value)}")


def _convert_tuple(args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key}={short(value)}: must be a list, e.g. {key}=[{str(value)[:100]}]")
    items = list(typing.cast(Sequence[Any], value))
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise UserError(f"{key}={short(value)}: must have {len(args)} entries")
    return tuple(convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(args, items, strict=True)))


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        items = dict.fromkeys(_type_name(arg) for arg in args if arg is not Ellipsis)
        return "a list of " + ", ".join(re.sub(r"^an? (\w+)$", r"\1s", item) for item in items)
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if hint is type(None):
        return "null"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def explicit_data_keys(run: LMRun) -> set[str]:
    """The keys in `INHERITED` that the LM's own configuration sets."""
    defaults = DataConfig()
    return {key for key in INHERITED if key in run.given or getattr(run.data, key) != getattr(defaults, key)}


def to_dict(run: Any) -> Tree:
    """The whole configuration as plain lists and dicts; `load_run(to_dict(run)) == run`.

    Keys that an LM will inherit from its oracle are left out.
    """
    tree: Tree = {}
    for field in settings_of(run):
        tree[field.name] = to_plain(getattr(run, field.name))
    if isinstance(run, LMRun):
        explicit = explicit_data_keys(run)
        tree["data"] = {key: v for key, v in tree["data"].items() if key in explicit or key not in INHERITED}
    return tree


def to_plain(value: Any) -> Any:
    """One value of a configuration as plain lists and dicts."""
    if isinstance(value, TaskSection):
        return {"name": value.name, **to_dict(value.options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [to_plain(item) for item in typing.cast(Sequence[Any], value)]
    return value


def dump_yaml(run: Run) -> str:
    """The whole configuration as YAML text."""
    return yaml.safe_dump(to_dict(run), sort_keys=False)


def describe_keys(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, documentation) of every field of a configuration dataclass, nested sections included."""
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    rows: list[tuple[str, str, str, str]] = []
    for field in settings_of(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            rows += describe_keys(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default = "required" if field.default is dataclasses.MISSING else str(to_plain(field.default))
        kind = "a section" if hint is Any else _type_name(hint)
        rows.append((f"{prefix}{field.name}", kind, default, docs.get(field.name, "")))
    return rows


def field_docs(cls: type) -> dict[str, str]:
    """Maps each field, inherited ones included, to the documentation string under it in the class body."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: text for base in bases for name, text in _own_field_docs(base).items()}


def _own_field_docs(cls: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for node, below in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(below.value.value).split())
    return docs
