"""Plugin modules that cannot be imported, or whose task is incomplete."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.camvid import camvid_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.config.plugins import import_plugin
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.registry import TASKS


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return camvid_data(tmp_path_factory.mktemp("camvid") / "set")


def test_a_plugin_given_as_a_file_name_is_refused(photos: Path) -> None:
    for name in ("plug/my_task.py", "./plug/my_task.py"):
        with pytest.raises(UserError, match=f"plugin '{name}' is a file name; give the module name, plug.my_task$"):
            import_plugin(name)
    with pytest.raises(UserError, match=r"unknown task 'xyz'; your own task needs plugins=\[MODULE\], and @register"):
        check_data("xyz", str(photos), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"SyntaxError: invalid syntax \(.*broken_plugin.py, line 1\)"),
        ("x = 1\nprint(x / 0)\n", r"ZeroDivisionError: division by zero \(.*broken_plugin.py, line 2\)"),
        (
            "from uvim_fsq.tasks.base import Taks\n",
            r"ImportError: cannot import name 'Taks' .*plugin.py, line 1\)",
        ),
        ("import no_such_thing\n", "No module named 'no_such_thing'"),
        (
            "from uvim_fsq.tasks.registry import TASKS, register_task\n@register_task('mine')\nclass Mine:\n    pass\n",
            r"Mine.Config must be a frozen dataclass \(.*broken_plugin.py, line 2",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "broken_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"plugin 'broken_plugin' cannot be imported.*{message}") as caught:
        import_plugin("broken_plugin")
    assert "\n" not in str(caught.value)


def test_a_task_without_its_methods_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_plugin.py").write_text(
        "from dataclasses import dataclass\n"
        "from uvim_fsq.tasks.base import Task\n"
        "from uvim_fsq.tasks.registry import register_task\n"
        "@dataclass(frozen=True)\nclass Config:\n    pass\n"
        "@register_task('half')\nclass Half(Task):\n    Config = Config\n    main_metric = 'x'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="task half, its start fails: TypeError: Can't instantiate abstract class Half"):
        check_data("half", str(photos), ["plugins=[half_plugin]"])
    monkeypatch.delitem(TASKS.entries, "half")
