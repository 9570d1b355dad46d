"""Programs that a run will call, compiled beside others."""

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


class Ahead:
    """Compiles programs on a thread of its own, which uses the cores that others leave idle.

    More threads were no faster on two cores. jax keeps a program for the call to come. An error is
    left to that call, which meets it too. Under a context of jax, as `jax.enable_x64(True)`,
    nothing is compiled: contexts hold for one thread, so jax would not take the programs.

    Attributes:
        ended: When the last program was compiled, by `time.perf_counter`.
    """

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._programs: dict[str, concurrent.futures.Future] = {}
        self.ended = 0.0

    def start(self, compilations: Mapping[str, Callable[[], Any]]) -> None:
        """Begins with the first of these functions; each compiles a program and returns it.

        A second call does nothing.
        """
        if self._programs or jax.config.jax_disable_jit:
            return
        modes = _modes()

        def compiled(compilation):
            try:
                return compilation() if modes == _modes() else None
            finally:
                self.ended = time.perf_counter()

        for name, compilation in compilations.items():
            self._programs[name] = self._pool.submit(compiled, compilation)

    def wait(self, name: str | None = None) -> None:
        """Waits until a program is compiled, if it is among them; None waits for all."""
        concurrent.futures.wait(
            [program for each, program in self._programs.items() if name in (None, each)]
        )

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is being compiled: XLA may crash if Python exits meanwhile."""
        self._pool.shutdown(cancel_futures=True)
        self._programs.clear()


def _modes() -> object:
    """What jax compiles by beside its arguments, as this thread sees it."""
    values = {name: getattr(jax.config, name, None) for name in jax.config.values}
    return values, jax.sharding.get_abstract_mesh()
