"""From YAML and `key=value` to the frozen dataclasses of config.py, and back. Everything a user mistypes ends here."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
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

from uvim_fsq.config import DataConfig, LMRun, OracleRun, Run, TaskSection
from uvim_fsq.errors import UserError
from uvim_fsq.plugins import name_plugins, refuse_strangers
from uvim_fsq.tasks.registry import config_class, load_plugins, task_names
from uvim_fsq.yaml_files import Tree, read_tree

#: Keys of `data` that an LM takes over from its oracle unless they are given.
INHERITED = ("root", "image_size", "train_split", "eval_split", "watch_split", "crop", "crop_area", "hflip")


def load_run(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, found_in: Path | None = None
) -> Run:
    """Reads a configuration file (or an already parsed tree), merges `key=value` overrides and checks every key.

    A file may say `extends: other.yaml` (relative to itself); it then holds only what differs.

    Args:
        found_in: the file of a trained run that the tree `source` stood in. It may be anybody's: it refers to nothing
            outside itself, and imports only plugins that the user trusts.

    Raises UserError naming the key for unknown keys (with "did you mean"), wrong types and values out of range.
    """
    tree = read_yaml(Path(source)) if isinstance(source, (str, Path)) else dict(source)
    if found_in is not None:
        _refuse_references(tree, found_in)
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError(f"override {short(override)} is not of the form key=value")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(OmegaConf.create(tree), given)
        resolved = OmegaConf.to_container(merged, resolve=True)
    except yaml.YAMLError as error:
        shown = short(" ".join(overrides))
        raise UserError(f"one of the overrides {shown} is not valid YAML: {_one_line(error)[:300]}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {str(error).splitlines()[0][:300]}") from error
    except RecursionError as error:
        raise UserError(f"one of the overrides {short(' '.join(overrides))} is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"one of the overrides {short(' '.join(overrides))} holds too long a number") from error
    own = found_in is None or "plugins" in given
    return _build_run(typing.cast(Tree, resolved), None if own else found_in)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def short(value: Any) -> str:
    """`value` as Python writes it, cut where it is long, for messages."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse_references(tree: Tree, file: Path) -> None:
    """`extends` and ${...} would put what lies on this machine into the run's results."""
    if "extends" in tree:
        raise UserError(f"{file} says `extends`; a run's configuration is whole, remove that line")
    todo: list[Any] = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*typing.cast(Tree, value), *typing.cast(Tree, value).values()]
        elif isinstance(value, list):
            todo += typing.cast(list[Any], value)
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"{file} holds ${{...}}, which a run's configuration may not; write the value itself there")


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> Tree:
    """A configuration file as a tree, what it extends included. Raises UserError for anything but keys and values."""
    if path.resolve() in children:
        raise UserError(f"{path}: `extends` goes round in a circle; remove it from one of the files")
    tree = read_tree(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends={short(parent)} must be the path of one file")
    base = read_yaml(path.parent / parent, (*children, path.resolve()))
    if _task_name(tree) not in (None, _task_name(base)):
        # Another task has other keys.
        base.pop("task", None)
    try:
        return typing.cast(Tree, OmegaConf.to_container(OmegaConf.merge(base, tree), resolve=False))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0][:300]}") from error


def _task_name(tree: Tree) -> Any:
    task: Any = tree.get("task")
    return typing.cast(Tree, task).get("name") if isinstance(task, dict) else None


def _build_run(tree: Tree, stranger: Path | None) -> Run:
    """`stranger`: the file behind `tree`, where that is not the user's own."""
    stage: Any = tree.get("stage", "lm" if "oracle" in tree else "oracle")
    if stage not in ("oracle", "lm"):
        raise UserError(f"stage={short(stage)}: must be oracle or lm")
    plugins = _convert(tuple[str, ...], tree.get("plugins") or (), "plugins")
    if stranger is None:
        name_plugins(plugins)
    else:
        refuse_strangers(plugins, stranger)
    tree = {**tree, "plugins": plugins}
    task: Any = tree.pop("task", None)
    named = isinstance(task, dict) and bool(typing.cast(Tree, task).get("name"))
    if stage == "oracle" and not named:
        raise UserError("task.name is missing; e.g. task.name=nyu_depth")
    if task is not None and not isinstance(task, dict):
        raise UserError(f"task: expected keys and values, got {short(task)}")
    # Before the task, whose plugins may take seconds to import.
    run: Run = build(OracleRun if stage == "oracle" else LMRun, {**tree, "task": None}, "")
    section: Any = _build_task(typing.cast(Tree, task), plugins) if named else (typing.cast(Any, task) or None)
    if isinstance(run, OracleRun):
        return dataclasses.replace(run, task=section)
    given = tuple(key for key in INHERITED if key in (tree.get("data") or {}))
    return dataclasses.replace(run, task=section, given=given)


def _build_task(tree: Tree, plugins: Sequence[str]) -> TaskSection:
    load_plugins(plugins)
    name = _convert(str, tree["name"], "task.name")
    options = {key: value for key, value in tree.items() if key != "name"}
    cls = config_class(name)
    known = {field.name for field in _settings(cls)}
    for key in options.keys() - known:
        owners = [other for other in task_names() if key in {field.name for field in _settings(config_class(other))}]
        if owners:
            raise UserError(f"task.{key} is a key of {' and '.join(owners)}, not of task.name={name}; remove it")
    return TaskSection(name, build(cls, options, "task."))


def build(cls: type, tree: Any, prefix: str) -> Any:
    """Converts a parsed tree into the frozen dataclass `cls`; `prefix` is the dotted path for messages."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.') or 'configuration'}: expected keys and values, got {short(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in _settings(cls)}
    values: Tree = {}
    for key, value in typing.cast(Tree, tree).items():
        if key not in fields:
            raise UserError(f"unknown key {prefix}{_word(key)}{_did_you_mean(key, fields, prefix)}")
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing; give it in the file or as {prefix}{name}=...")
    return cls(**values)


def _settings(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a configuration dataclass (or an instance) that a user may set."""
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("internal")]


def _word(key: Any) -> str:
    """A key for a message; text that is none may be a line of some other file, which is nobody's business."""
    return str(key) if re.fullmatch(r"[\w.-]{1,40}", str(key)) else "(text that is no key's name)"


def _did_you_mean(key: Any, fields: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(str(key), list(fields), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known keys: {', '.join(fields)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`; ints pass for floats, lists for tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, key, hint)
    if origin is Literal:
        if value is False and "no" in args:
            return "no"  # YAML's reading of an unquoted no
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
        raise UserError(f"{key}={short(value)}: must fit into 64 bits")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and value is None:
        return ""  # `key=` on the command line
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{key}={short(value)}: must be {_type_name(hint)}{_truth(value)}")


def _truth(value: Any) -> str:
    return " (YAML reads yes and on as true, no and off as false)" if isinstance(value, bool) else ""


def _convert_union(args: tuple[Any, ...], value: Any, key: str, hint: Any) -> Any:
    if value is None and type(None) in args:
        return None
    for option in args:
        if option is type(None):
            continue
        try:
            return _convert(option, value, key)
        except UserError:
            continue
    raise UserError(f"{key}={short(value)}: must be {_type_name(hint)}{_truth(value)}")


def _convert_tuple(args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key}={short(value)}: must be a list, e.g. {key}=[{str(value)[:100]}]")
    items = list(typing.cast(Sequence[Any], value))
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise UserError(f"{key}={short(value)}: must have {len(args)} entries")
    return tuple(_convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(args, items, strict=True)))


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        return "a list of " + ", ".join(dict.fromkeys(_type_name(arg) for arg in args if arg is not Ellipsis))
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if hint is type(None):
        return "null"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def to_dict(run: Any) -> Tree:
    """The whole configuration as plain lists and dicts; `load_run(to_dict(run)) == run`.

    What an LM has yet to inherit from its oracle is left out.
    """
    tree: Tree = {}
    for field in _settings(run):
        tree[field.name] = _plain(getattr(run, field.name))
    if isinstance(run, LMRun):
        explicit = _explicit(run)
        tree["data"] = {key: v for key, v in tree["data"].items() if key in explicit or key not in INHERITED}
    return tree


def changeable(task: TaskSection) -> tuple[str, ...]:
    """The task's keys that define no labels, as its Config declares them."""
    return getattr(task.options, "changeable", ())


def _explicit(run: LMRun) -> set[str]:
    defaults = DataConfig()
    return {key for key in INHERITED if key in run.given or getattr(run.data, key) != getattr(defaults, key)}


def _plain(value: Any) -> Any:
    if isinstance(value, TaskSection):
        return {"name": value.name, **to_dict(value.options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast(Sequence[Any], value)]
    return value


def dump_yaml(run: Run) -> str:
    """The whole configuration as YAML text."""
    return yaml.safe_dump(to_dict(run), sort_keys=False)


def resolve_lm(run: LMRun, oracle: OracleRun) -> LMRun:
    """Fills an LM's task, plugins and data from its oracle's; keys of `data` that were not given are inherited.

    Raises UserError when the LM asks for another task, another image size or other label channels.
    """
    plugins = tuple(dict.fromkeys((*oracle.plugins, *run.plugins)))
    own: Tree = _plain(run.task) or {}
    theirs: Tree = _plain(oracle.task)
    name = own.get("name", theirs["name"])
    if name != theirs["name"]:
        raise UserError(
            f"task.name={name} but the oracle {run.oracle} was trained for {theirs['name']}; "
            "point `oracle=` at an oracle of this task"
        )
    section = _build_task({**theirs, **own}, plugins)
    for key in (field.name for field in _settings(section.options)):
        value, fixed = getattr(section.options, key), getattr(oracle.task.options, key)
        if value != fixed and key not in changeable(section):
            raise UserError(
                f"task.{key}={value} but the oracle {run.oracle} was trained with {fixed}; "
                "leave it out to take over the oracle's"
            )
    explicit = _explicit(run)
    data = dataclasses.replace(run.data, **{k: getattr(oracle.data, k) for k in INHERITED if k not in explicit})
    if data.image_size != oracle.data.image_size:
        raise UserError(
            f"data.image_size={data.image_size} but the oracle {run.oracle} was trained at {oracle.data.image_size}; "
            "leave it out to take over the oracle's"
        )
    return dataclasses.replace(run, plugins=plugins, task=section, data=data, given=INHERITED)


def find_data_root(root: str) -> Path:
    """The folder behind `data.root`: absolute, or under $UVIM_FSQ_DATA (default datasets/), or relative to here."""
    if not root:
        raise UserError("data.root is empty; give the data set's folder, e.g. data.root=nyudepthv2")
    # Of an absolute path both are the same.
    tried = list(dict.fromkeys([Path(os.environ.get("UVIM_FSQ_DATA", "datasets")) / root, Path(root)]))
    for path in tried:
        if path.exists():
            return path
    raise UserError(f"data.root={root}: no such folder; looked for {' and '.join(map(str, tried))}")


def describe_keys(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, documentation) of every field of a configuration dataclass, nested ones flattened."""
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    rows: list[tuple[str, str, str, str]] = []
    for field in _settings(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            rows += describe_keys(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default = "required" if field.default is dataclasses.MISSING else str(_plain(field.default))
        kind = "a section" if hint is Any else _type_name(hint)
        rows.append((f"{prefix}{field.name}", kind, default, docs.get(field.name, "")))
    return rows


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands under it in the class body."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for node, below in zip(body, body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[node.target.id] = str(below.value.value)
    return docs
