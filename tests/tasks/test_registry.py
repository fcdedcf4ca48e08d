"""The task registry, and tasks from outside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.registry import TASKS, register_task, task_class


def test_duplicates_are_refused_and_unknown_names_list_the_known() -> None:
    @dataclass(frozen=True)
    class Config:
        pass

    with pytest.raises(ValueError, match="already registered"):
        register_task("nyu_depth")(type("Other", (Task,), {"Config": Config}))
    with pytest.raises(UserError, match="Known tasks: .*nyu_depth"):
        task_class("nothing_like_it")


def test_a_task_from_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_plugin.py").write_text(
        "from uvim_fsq.tasks.nyu_depth.task import NYUDepth\n"
        "from uvim_fsq.tasks.registry import register_task\n"
        "class Mine(NYUDepth):\n    pass\n"
        "register_task('my_depth')(Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = load_run({"task": {"name": "my_depth", "num_bins": 9}}, ["plugins=[my_plugin]"])
    assert run.task.options.num_bins == 9 and task_class("my_depth").name == "my_depth"
    monkeypatch.delitem(TASKS.entries, "my_depth")
