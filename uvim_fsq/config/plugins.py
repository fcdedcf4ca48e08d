"""The modules listed under `plugins:`: which of them may be imported, and how they are imported.

Importing a module runs its code. A user's own configuration may list any module. The configuration of a trained run may
come from anyone, so its plugins are imported only if the user trusts them. Independent of tasks.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from pathlib import Path

from uvim_fsq.errors import UserError

#: The entry point group through which installed packages provide tasks.
GROUP = "uvim_fsq.tasks"
#: Modules that the user has named in this process: on the command line, in their own configuration file, or in Python.
_named: set[str] = set()
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting(trust: bool = True) -> Generator[None]:
    """In the block, the plugins of any run may be imported. UVIM_FSQ_TRUST=1 allows it for the whole process."""
    before = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(before)


def trusts_runs() -> bool:
    """Whether code that comes with a run may be executed, whoever made it."""
    return _trusting.get() or os.environ.get("UVIM_FSQ_TRUST") == "1"


def environment() -> dict[str, str]:
    """The environment variables for a process of ours that is to trust what this one trusts."""
    return {**os.environ, **({"UVIM_FSQ_TRUST": "1"} if trusts_runs() else {})}


def name_plugins(modules: Iterable[str]) -> None:
    """Records modules that the user has named, and so trusts."""
    _named.update(modules)


def refuse_strangers(modules: Iterable[str], file: Path) -> None:
    """Raises UserError for the first plugin of a trained run that the user has neither named, installed nor trusted.

    Args:
        modules: the run's plugins.
        file: the run's configuration file, for the message.
    """
    if trusts_runs():
        return
    known = _named | {point.module for point in entry_points(group=GROUP)}
    for module in modules:
        if module not in known:
            raise UserError(
                f"{file} asks to import the plugin {module!r}, which runs its code ({_place(module)}); "
                f"if you trust it, add --trust (Python: trust=True; or set UVIM_FSQ_TRUST=1), or plugins=[{module}]"
                if module.replace(".", "").isidentifier()
                else f"{file} asks to import the plugin {module!r}, which is not a module name; remove it"
            )


def import_plugin(module: str) -> None:
    """Imports a trusted module. The working directory is searched last.

    Raises UserError if it cannot be imported.
    """
    if module in sys.modules:
        return
    if "/" in module or module.endswith(".py"):
        name = module.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"plugin {module!r} is a file name; give the module name, {name}")
    folder = os.getcwd()
    try:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if folder in sys.path or not f"{module}.".startswith(f"{error.name}."):
                raise
            # The folder stays on the path: the plugin may later import modules next to it.
            sys.path.append(folder)
            importlib.invalidate_caches()
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"plugin {module!r} cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(f"plugin {module!r} cannot be imported: {describe_fault(error)}") from error


@contextmanager
def plugin_code(what: str) -> Generator[None]:
    """Runs plugin code: converts its exceptions into a one-line UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} fails: {describe_fault(error)}") from error


def describe_fault(error: Exception) -> str:
    """A plugin's exception in one line, with the file and line of its code."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # The plugin's own line is more useful to its author than the line in a library or in this package that raised.
    skipped = ("site-packages", "<frozen ", os.path.dirname(os.path.dirname(__file__)))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in skipped)
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _place(module: str) -> str:
    """Where `module` would be imported from, found without running any of its code."""
    base = module.replace(".", os.sep)
    for folder in (*sys.path, os.getcwd()):
        for file in (f"{base}.py", os.path.join(base, "__init__.py")):
            found = os.path.abspath(os.path.join(folder, file))
            if os.path.isfile(found):
                return f"from {found}"
    return "no file of that name was found"
