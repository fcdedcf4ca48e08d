"""`torch.compile` with the settings that this package needs, and torch's compiler left unloaded until it is needed."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

from uvim_fsq.errors import UserError

Compilable = TypeVar("Compilable", bound=Callable[..., Any])
COMPILERS = ("g++", "clang++", "c++", "cl")


#: What to do without a compiler.
WITHOUT = "or set train.compile=false eval.compile=false eval.int8_cross_kv=false"


def require_compiler(remedy: str = WITHOUT) -> None:
    """Raises UserError, ending with `remedy`, if no C++ compiler is found ($CXX, or one of `COMPILERS` on the path)."""
    if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"compilation needs a C++ compiler; install g++, {remedy}")


def compiled(function: Compilable, **options: Any) -> Compilable:
    """`function` compiled with static shapes: one graph per batch size. `options` are passed to `torch.compile`.

    Raises UserError if there is no C++ compiler. Torch itself would only notice in the first step.
    """
    require_compiler()
    # The graph splitting for DistributedDataParallel does not support activation checkpointing (the label head).
    torch._dynamo.config.optimize_ddp = False
    # Decoding has one graph per batch size and cache length; the default limit of 8 is too low.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, **options)  # type: ignore[return-value]


# --- the compiler's modules, unloaded until they are needed -----------------------------------------------------------

_DYNAMO = "torch._dynamo"
#: The attribute of a function under which torch keeps the result of `torch._dynamo.disable` (torch/_compile.py).
_KEPT = "__dynamo_disable"


@contextmanager
def compiler_unloaded() -> Iterator[None]:
    """In the block, torch's compiler is imported once something is compiled, not by libraries that merely mention it.

    The import of `torch._dynamo` takes a second and 1,000 modules. torchvision, and timm with it, torch's optimizers
    and Accelerate import it in every process: to keep functions out of graphs, to end graphs, and to ask whether a
    module is compiled. While nothing is compiled, these questions have simple answers, which stand-ins for the modules
    give. Whatever else is asked of them, `torch.compile` included, imports the real modules, which replace them.
    Nothing remains of the stand-ins after the block.
    """
    if _DYNAMO in sys.modules:  # the compiler itself, or the stand-ins of a block around this one
        yield
        return
    unload = _Unloaded()
    unload.install()
    try:
        yield
    finally:
        unload.remove()


class _Unloaded(MetaPathFinder, Loader):
    """The stand-ins of one block, and the import of the modules that they stand for."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {
            _DYNAMO: _StandIn(_DYNAMO, self, graph_break=_nothing, disable=self._disable),
            f"{_DYNAMO}.eval_frame": _StandIn(f"{_DYNAMO}.eval_frame", self, OptimizedModule=_OptimizedModule),
            f"{_DYNAMO}.utils": _StandIn(f"{_DYNAMO}.utils", self, is_compile_supported=_is_compile_supported),
        }
        for name, module in self.modules.items():
            if name != _DYNAMO:
                setattr(self.modules[_DYNAMO], name.rpartition(".")[2], module)
        self._disabled: list[Any] = []

    def install(self) -> None:
        sys.modules.update(self.modules)
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Removes the stand-ins, and what torch has noted about functions while they were there."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in self.modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        for function in self._disabled:
            if getattr(function, _KEPT, None) is function:
                delattr(function, _KEPT)
        self._disabled.clear()

    def _disable(self, fn: Any = None, *args: Any, **options: Any) -> Any:
        """torch._dynamo.disable(fn): without graphs, there is nothing to keep `fn` out of."""
        if fn is None:
            return self.real(_DYNAMO).disable(fn, *args, **options)
        self._disabled.append(fn)
        return fn

    def real(self, name: str) -> ModuleType:
        """The module that a stand-in stands for."""
        self.remove()
        return importlib.import_module(name)

    # The stand-ins look like packages. Importing another module of the compiler imports all of it.

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not fullname.startswith(f"{_DYNAMO}."):
            return None
        spec = ModuleSpec(fullname, self)
        spec.loader_state = self.real(fullname)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = spec.loader_state
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state


class _StandIn(ModuleType):
    """A module that has only the given names, and gets any other from the module that it stands for."""

    def __init__(self, name: str, unloaded: _Unloaded, **names: Any) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(names, _unloaded=unloaded)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by code that looks through sys.modules
            raise AttributeError(name)
        return getattr(self._unloaded.real(self.__name__), name)


def _nothing(*args: Any, **options: Any) -> None:
    """torch._dynamo.graph_break: outside graphs it does nothing."""


def _is_compile_supported(device_type: str) -> bool:
    return importlib.import_module(f"{_DYNAMO}.utils").is_compile_supported(device_type)


class _KindOfModule(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        real = sys.modules.get(f"{_DYNAMO}.eval_frame")
        found = getattr(real, "OptimizedModule", cls)
        return found is not cls and isinstance(instance, found)


class _OptimizedModule(metaclass=_KindOfModule):
    """torch._dynamo.eval_frame.OptimizedModule: a compiled module. There is none before the compiler is imported."""
