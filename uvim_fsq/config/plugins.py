"""Modules that a configuration names under `plugins:`: which of them may be imported, and from where.

To import a module is to run it. A user's own configuration may name what it likes; that of a trained run, which may be
anybody's, only what the user trusts. Knows nothing of tasks.
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

#: The group of entry points under which installed packages offer tasks.
GROUP = "uvim_fsq.tasks"
#: What the user named in this process: on the command line, in a configuration file of theirs, in Python.
_named: set[str] = set()
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting(trust: bool = True) -> Generator[None]:
    """Inside, the plugins of any run may be imported; UVIM_FSQ_TRUST=1 says so for the whole process."""
    before = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(before)


def name_plugins(modules: Iterable[str]) -> None:
    """Takes note of modules that the user has named, which is to trust them."""
    _named.update(modules)


def refuse_strangers(modules: Iterable[str], file: Path) -> None:
    """Raises UserError for the first plugin of a trained run that the user has not named, installed or trusted.

    Args:
        file: the run's configuration, for the message.
    """
    if _trusting.get() or os.environ.get("UVIM_FSQ_TRUST") == "1":
        return
    known = _named | {point.module for point in entry_points(group=GROUP)}
    for module in modules:
        if module not in known:
            raise UserError(
                f"{file} asks to import the plugin {module!r}, which runs its code ({_place(module)}); "
                f"if you trust it, add --trust (Python: trust=True; or set UVIM_FSQ_TRUST=1), or plugins=[{module}]"
                if module.replace(".", "").isidentifier()
                else f"{file} asks to import the plugin {module!r}, which is no module's name; remove it"
            )


def import_plugin(module: str) -> None:
    """Imports a module that was found to be trusted; the current folder is searched last of all.

    Raises UserError when it cannot be imported.
    """
    if module in sys.modules:
        return
    if "/" in module or module.endswith(".py"):
        name = module.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"plugin {module!r} is the name of a file; give the module's, {name}")
    folder = os.getcwd()
    try:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if folder in sys.path or not f"{module}.".startswith(f"{error.name}."):
                raise
            # It stays on the path: the plugin may import what lies beside it later.
            sys.path.append(folder)
            importlib.invalidate_caches()
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"plugin {module!r} cannot be imported ({error}); is it installed, or its folder on PYTHONPATH?"
        ) from error
    except Exception as error:
        raise UserError(f"plugin {module!r} cannot be imported: {describe(error)}") from error


@contextmanager
def plugin_code(what: str) -> Generator[None]:
    """Around calling the code of a plugin: its exceptions become a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} fails: {describe(error)}") from error


def describe(error: Exception) -> str:
    """What a plugin's code did wrong, and in which line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    said = " ".join(f"{type(error).__name__}: {error}".split())
    # A library's lines, or ours, tell the author of a plugin less than the line that called them.
    others = ("site-packages", "<frozen ", os.path.dirname(__file__))
    places = [
        place
        for place in traceback.extract_tb(error.__traceback__)
        if not any(other in place.filename for other in others)
    ]
    return f"{said} ({places[-1].filename}, line {places[-1].lineno})" if places else said


def _place(module: str) -> str:
    """Where `module` would be imported from, found without running anything."""
    base = module.replace(".", os.sep)
    for folder in (*sys.path, os.getcwd()):
        for file in (f"{base}.py", os.path.join(base, "__init__.py")):
            found = os.path.abspath(os.path.join(folder, file))
            if os.path.isfile(found):
                return f"from {found}"
    return "no file of that name is found here"
