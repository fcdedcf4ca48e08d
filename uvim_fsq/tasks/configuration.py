"""Loads complete run configurations, including the task's own keys: YAML and `key=value` to a dataclass of `schema`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.config.parse import (
    INHERITED,
    build,
    convert,
    describe_keys,
    explicit_data_keys,
    merge,
    settings_of,
    short,
    to_plain,
)
from uvim_fsq.config.plugins import name_plugins, refuse_strangers
from uvim_fsq.config.rules import check_context_weight
from uvim_fsq.config.schema import STAGES, DirectRun, LMRun, OracleRun, Run, TaskSection
from uvim_fsq.config.yaml_files import Tree
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.registry import config_class, load_plugins, task_names

MISSING: Any = object()


def load_run(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, found_in: Path | None = None
) -> Run:
    """Reads a configuration file (or an already parsed tree), merges `key=value` overrides and checks keys and types.

    A file with `extends: other.yaml` (relative to itself) only needs the settings that differ.

    Args:
        found_in: the file of a trained run that the tree `source` was read from. It may come from anyone: it must not
            refer to anything outside itself, and only plugins that the user trusts are imported.

    Raises UserError naming the key, for unknown keys (with a suggestion) and wrong types.
    """
    tree, given = merge(source, overrides, found_in=found_in)
    own = found_in is None or "plugins" in given
    return _build_run(tree, None if own else found_in)


def _build_run(tree: Tree, untrusted: Path | None) -> Run:
    """`untrusted`: the file that `tree` was read from, unless it is the user's own."""
    stage: Any = tree.get("stage", "lm" if "oracle" in tree else "oracle")
    if stage not in tuple(STAGES):  # it may be a list
        raise UserError(f"stage={short(stage)}: must be one of {', '.join(STAGES)}")
    plugins = convert(tuple[str, ...], tree.get("plugins") or (), "plugins")
    if untrusted is None:
        name_plugins(plugins)
    else:
        refuse_strangers(plugins, untrusted)
    tree = {**tree, "plugins": plugins}
    task: Any = tree.pop("task", None)
    named = isinstance(task, dict) and bool(typing.cast(Tree, task).get("name"))
    if stage != "lm" and not named:
        raise UserError("task.name is missing; e.g. task.name=nyu_depth")
    if task is not None and not isinstance(task, dict):
        raise UserError(f"task: expected keys and values, got {short(task)}")
    if stage == "direct":
        _refuse_token_keys(tree)
    # Check everything else before the task, whose plugins may take seconds to import.
    run: Run = build(STAGES[stage], {**tree, "task": None}, "")
    section: Any = _build_task(typing.cast(Tree, task), plugins) if named else (typing.cast(Any, task) or None)
    if not isinstance(run, LMRun):
        return dataclasses.replace(run, task=section)
    given = tuple(key for key in INHERITED if key in (tree.get("data") or {}))
    return dataclasses.replace(run, task=section, given=given)


def _token_keys() -> dict[str, str]:
    """Key -> stage, for the keys that runs with tokens have and direct runs lack."""
    known = {key for key, *_ in describe_keys(DirectRun)}
    stages = ("oracle", "lm")
    return {key: stage for stage in stages for key, *_ in describe_keys(STAGES[stage]) if key not in known}


def _refuse_token_keys(tree: Tree) -> None:
    """Refuses keys of the stages with tokens in the configuration of a direct run, by the name of their stage."""
    for key, stage in _token_keys().items():
        value: Any = tree
        for name in key.split("."):
            value = typing.cast(Tree, value).get(name, MISSING) if isinstance(value, dict) else MISSING
        if value is not MISSING:
            raise UserError(f"{key} is a key of stage {stage}; a direct run has no tokens, remove it")


def without_token_keys(overrides: Sequence[str]) -> list[str]:
    """The `key=value` overrides of a run with tokens that a direct run can have too."""
    dropped = _token_keys()
    return [override for override in overrides if override.partition("=")[0] not in dropped]


def _build_task(tree: Tree, plugins: Sequence[str]) -> TaskSection:
    load_plugins(plugins)
    name = convert(str, tree["name"], "task.name")
    options = {key: value for key, value in tree.items() if key != "name"}
    cls = config_class(name)
    known = {field.name for field in settings_of(cls)}
    for key in options.keys() - known:
        owners = [other for other in task_names() if key in {field.name for field in settings_of(config_class(other))}]
        if owners:
            raise UserError(f"task.{key} is a key of {' and '.join(owners)}, not of task.name={name}; remove it")
    return TaskSection(name, build(cls, options, "task."))


def changeable(task: TaskSection) -> tuple[str, ...]:
    """The keys of the task that may change after training, because they do not affect the labels."""
    return getattr(task.options, "changeable", ())


def resolve_lm(run: LMRun, oracle: OracleRun) -> LMRun:
    """Fills an LM's task, plugins and data in from its oracle; keys of `data` that are not set are inherited.

    Raises UserError if the LM sets another task, another image size or other label settings, or mixes its predictions
    with a context that the oracle does not have.
    """
    plugins = tuple(dict.fromkeys((*oracle.plugins, *run.plugins)))
    own: Tree = to_plain(run.task) or {}
    inherited: Tree = to_plain(oracle.task)
    name = own.get("name", inherited["name"])
    if name != inherited["name"]:
        raise UserError(
            f"task.name={name} but the oracle {run.oracle} was trained for {inherited['name']}; "
            "set `oracle=` to an oracle of this task"
        )
    section = _build_task({**inherited, **own}, plugins)
    for key in (field.name for field in settings_of(section.options)):
        value, fixed = getattr(section.options, key), getattr(oracle.task.options, key)
        if value != fixed and key not in changeable(section):
            raise UserError(
                f"task.{key}={value} but the oracle {run.oracle} was trained with {fixed}; "
                "remove it to use the oracle's"
            )
    explicit = explicit_data_keys(run)
    data = dataclasses.replace(run.data, **{k: getattr(oracle.data, k) for k in INHERITED if k not in explicit})
    if data.image_size != oracle.data.image_size:
        raise UserError(
            f"data.image_size={data.image_size} but the oracle {run.oracle} was trained at {oracle.data.image_size}; "
            "remove it to use the oracle's"
        )
    check_context_weight(run.eval.context_weight, oracle.model.context, run.oracle)
    return dataclasses.replace(run, plugins=plugins, task=section, data=data, given=INHERITED)
