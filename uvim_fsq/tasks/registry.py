"""Registry of tasks by name. An external task registers itself when its module, listed in `plugins`, is imported.

Built-in tasks are imported on first use; their configuration classes can be imported without torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from uvim_fsq.config.plugins import GROUP, import_plugin, name_plugins
from uvim_fsq.config.registry import Registry
from uvim_fsq.errors import UserError

if TYPE_CHECKING:
    from uvim_fsq.tasks.base import Task

#: Built-in tasks: name, which is also the package name -> class in NAME/config.py. NAME/task.py registers the task.
BUILT_IN = {
    "coco_panoptic": "CocoPanopticConfig",
    "imagenet_color": "ImagenetColorConfig",
    "nyu_depth": "NYUDepthConfig",
    "semantic_segmentation": "SemanticSegmentationConfig",
}
TASKS: Registry[type[Task]] = Registry("task", "task.name")
T = TypeVar("T", bound="Task")


def _built_in_module(name: str, part: str) -> str:
    return f"uvim_fsq.tasks.{name}.{part}"


def register_task(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that registers a Task as `name`.

    Raises ValueError if another class is registered under that name, or if `Config` is not a frozen dataclass.
    """

    def register(cls: type[T]) -> type[T]:
        if name in BUILT_IN and cls.__module__ != _built_in_module(name, "task"):
            raise ValueError(f"task {name!r} is already registered by {_built_in_module(name, 'task')}")
        config = getattr(cls, "Config", None)
        if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise ValueError(f"{cls.__qualname__}.Config must be a frozen dataclass")
        TASKS.add(name, cls)
        cls.name = name
        return cls

    return register


def load_plugins(modules: Iterable[str]) -> None:
    """Imports plugins, which register tasks, quantizers or token models.

    The caller trusts them; see `config.plugins.refuse_strangers` for those of a run.

    Raises UserError naming a module that cannot be imported.
    """
    modules = tuple(modules)
    name_plugins(modules)
    for module in modules:
        import_plugin(module)


@functools.cache
def _load_installed() -> None:
    """Imports the tasks of other installed packages (entry point group `uvim_fsq.tasks`)."""
    for point in entry_points(group=GROUP):
        point.load()


def task_names() -> list[str]:
    """All task names, sorted: built in, from installed packages, and registered so far."""
    _load_installed()
    return sorted({*BUILT_IN, *TASKS.entries})


def task_class(name: str) -> type[Task]:
    """The class registered under `name`. Raises UserError listing the known tasks."""
    if name in BUILT_IN:
        importlib.import_module(_built_in_module(name, "task"))
    elif name not in TASKS.entries:
        names = task_names()
        if name not in TASKS.entries:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            advice = f"your own task needs plugins=[MODULE], and @register_task({name!r}) in that module"
            hint = f"did you mean {close[0]!r}?" if close else f"{advice}."
            raise UserError(f"unknown task {name!r}; {hint} Known tasks: {', '.join(names)}")
    return TASKS.entries[name]


def config_class(name: str) -> type:
    """The dataclass of the keys under `task:`, without importing a built-in task. Raises UserError as `task_class`."""
    if name in BUILT_IN:
        return getattr(importlib.import_module(_built_in_module(name, "config")), BUILT_IN[name])
    return task_class(name).Config
