"""Any `Store`, in processes that may die before or after each operation of it that changes it.

That is all there is where a name is written whole or not at all, as in an object store. Nothing is
lost by a power cut at our end of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from eevp_batch.storage.store import Store
from tests.faults.labels import label
from tests.faults.machine import Machine

CHANGES = ("write", "create_exclusive", "publish", "delete", "append_line")


class WatchedStore:
    """One output folder, opened by `open_store` for each process."""

    def __init__(self, machine: Machine, open_store: Callable[[], Store]) -> None:
        self.machine, self.plain = machine, open_store

    def store(self) -> Store:
        """The folder, as a process opens it."""
        store = self.plain()
        for name in CHANGES:
            setattr(store, name, self._watched(name, getattr(store, name)))
        # To the system all processes of the machine are one, which lives: nobody would let go.
        held = SimpleNamespace(check=lambda: None)
        store.lock = lambda rel: nullcontext(held)  # type: ignore[method-assign]
        return store

    def interposed(self) -> Any:
        """Nothing is to be done: the stores tell."""
        return nullcontext()

    def lose_power(self, chance: random.Random) -> None:
        """Nothing is lost."""

    def _watched(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(rel: str, *rest: Any, **options: Any) -> Any:
            with self._operation(f"{name} {label(rest[0] if name == 'publish' else rel)}"):
                return change(rel, *rest, **options)

        return call

    @contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        """One operation, the smaller ones that it is made of left out."""
        self.machine.check_alive()
        if self._is_inside:
            yield
            return
        self.machine.point(f"before {name}")
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False
        self.machine.point(f"after {name}")

    _is_inside = False
