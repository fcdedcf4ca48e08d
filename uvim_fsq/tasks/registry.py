"""Tasks by name. An out-of-tree task registers itself when its module, named in `plugins`, is imported."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TypeVar

from uvim_fsq.errors import UserError
from uvim_fsq.plugins import GROUP, import_plugin, name_plugins
from uvim_fsq.tasks.base import Task

_TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=Task)


def register_task(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that adds a Task under `name`. Raises ValueError if another class already has that name."""

    def register(cls: type[T]) -> type[T]:
        known = _TASKS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"task {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        config = getattr(cls, "Config", None)
        if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise ValueError(f"{cls.__qualname__}.Config must be a frozen dataclass")
        cls.name = name
        _TASKS[name] = cls
        return cls

    return register


def load_plugins(modules: Iterable[str]) -> None:
    """Imports the built-in tasks, the entry points of group `uvim_fsq.tasks` and the given modules, which the caller
    trusts (`plugins.refuse_strangers` asks that of a run's).

    Raises UserError naming a module that cannot be imported.
    """
    importlib.import_module("uvim_fsq.tasks")
    for point in entry_points(group=GROUP):
        point.load()
    modules = tuple(modules)
    name_plugins(modules)
    for module in modules:
        import_plugin(module)


def task_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TASKS)


def task_class(name: str) -> type[Task]:
    """The class registered under `name`. Raises UserError listing what exists."""
    if name not in _TASKS:
        close = difflib.get_close_matches(name, _TASKS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"unknown task {name!r}{hint} Known tasks: {', '.join(task_names()) or 'none'}")
    return _TASKS[name]
