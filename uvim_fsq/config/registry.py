"""Names under which tasks, quantizers and token models register themselves, built-in ones and those of plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from uvim_fsq.errors import UserError

#: What is registered: a class, or a function that builds something.
Maker = TypeVar("Maker", bound=Callable[..., object])


class Registry(Generic[Maker]):
    """Entries by name; one name belongs to one entry.

    Args:
        kind: what the entries are, for messages, e.g. "quantizer".
        key: the configuration key that selects one.
    """

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key
        self.entries: dict[str, Maker] = {}

    def add(self, name: str, entry: Maker) -> None:
        """Adds an entry. Defining the same one again, as reloading a module does, replaces it.

        Raises ValueError if another one is already registered under that name.
        """
        known = self.entries.get(name)
        if known is not None and _place(known) != _place(entry):
            raise ValueError(f"{self.kind} {name!r} is already registered by {_place(known)}")
        self.entries[name] = entry

    def find(self, name: str) -> Maker:
        """The entry of that name. Raises UserError with the known names if there is none."""
        if name not in self.entries:
            raise UserError(
                f"{self.key}={name}: known {self.kind}s are {', '.join(sorted(self.entries))}; "
                "a custom one must be registered by a module in `plugins`"
            )
        return self.entries[name]


def _place(entry: Callable[..., object]) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"
