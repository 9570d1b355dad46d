"""Programs that a run will call, compiled beside others."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any


class Ahead:
    """Compiles programs, one after the other, on a thread of its own.

    jax keeps a program for the call to come. An error is left to that call, which meets it too.
    """

    def __init__(self):
        self._ready: dict[str, threading.Event] = {}
        self._kept: list[Any] = []
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def start(self, compilations: Mapping[str, Callable[[], Any]]) -> None:
        """Begins with the first of these functions; each compiles a program and returns it."""
        self._ready = {name: threading.Event() for name in compilations}
        self._thread = threading.Thread(target=self._work, args=(compilations,), daemon=True)
        self._thread.start()

    def _work(self, compilations: Mapping[str, Callable[[], Any]]) -> None:
        for name, compilation in compilations.items():
            if not self._is_closed:
                with contextlib.suppress(Exception):  # The call raises it.
                    self._kept.append(compilation())
            self._ready[name].set()

    def wait(self, name: str | None = None) -> None:
        """Waits until a program is compiled, if it is among them; None waits for all."""
        for each, ready in self._ready.items():
            if name in (None, each):
                ready.wait()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for the program that is being compiled: XLA may crash if Python exits meanwhile."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.join()
