"""How long the devices take, while the host does other work."""

import contextlib
import threading
import time
from collections.abc import Callable

import jax

from attention_jax.training.metrics import Busy
from attention_jax.types import PyTree


class Finish:
    """Notes the time at which arrays are ready, while the host does other work."""

    def __init__(self, arrays: PyTree):
        self._thread = threading.Thread(target=self._wait, args=(arrays,), daemon=True)
        self._thread.start()

    def _wait(self, arrays: PyTree) -> None:
        with contextlib.suppress(Exception):  # Fetching the arrays raises it again.
            jax.block_until_ready(arrays)
        self._time = time.perf_counter()

    def time(self) -> float:
        """The time by `time.perf_counter`; waits for the arrays."""
        self._thread.join()
        return self._time


class FirstCall:
    """A compiled function that measures its first call, with compilation.

    That call waits for the devices before and after, so that its time holds no other work. It says
    that it compiles or runs if that takes long.

    Args:
        function: Compiled by jax.
        what: Its name for the reader.
        busy: Shows what takes long.
        wait: Returns when another thread does not compile the function any more.

    Attributes:
        called: When the first call began, by `time.perf_counter`; None before it.
        seconds: How long it took; None before its end.
    """

    def __init__(
        self, function: Callable, what: str, busy: Busy, wait: Callable[[], None] = lambda: None
    ):
        self._function, self._what, self._busy, self._wait = function, what, busy, wait
        self.called = self.seconds = None

    def __call__(self, *arguments):
        if self.seconds is not None:
            return self._function(*arguments)
        jax.block_until_ready(arguments)
        self.called = time.perf_counter()
        with self._busy(f"compiling {self._what}"):
            self._wait()
            result = self._function(*arguments)
        with self._busy(f"running {self._what} for the first time"):
            jax.block_until_ready(result)
        self.seconds = time.perf_counter() - self.called
        return result
