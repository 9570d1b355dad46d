"""The process that a run lives in: signals, lines on the screen, the compile cache, versions.

Importing this module is cheap: jax is imported by `prepare` alone.
"""

import logging
import os
import signal
import threading
import warnings

from attention_jax import __version__


class StopSignals:
    """SIGTERM and SIGINT become a number to look at; a second one acts as it did before.

    Python handles signals in the main thread alone; elsewhere they are left as they are.
    """

    def __init__(self):
        self.number: int | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number, frame):
        self.number = number
        self.__exit__()


def prepare() -> None:
    """What every run wants of jax."""
    # "Unable to initialize backend 'tpu'" is no news on a machine without one.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    _keep_compiled_programs()


def _keep_compiled_programs():
    """A program compiled once is read from the disk by the next process."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "attention_jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Addresses in memory are other ones in each process. What is called is in the key all the
        # same: see `functional.mesh`.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    # On a full disk they are compiled anew each time; jax tells of each of them, in two lines.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def versions() -> dict[str, str]:
    """Of Python, of this package, and of the packages that decide the numbers of a run."""
    import importlib.metadata
    import platform

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "attention_jax": __version__, **versions}


def say(*lines: str) -> None:
    """Prints lines at once, whoever reads them."""
    print(*lines, sep="\n", flush=True)
