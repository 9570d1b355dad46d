"""The process of a run: signals, streams, exit, the compile cache, versions.

Importing this module is cheap: jax is imported by `prepare` alone.
"""

import atexit
import contextlib
import logging
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from typing import NoReturn

from attention_jax import __version__

# Signals that ask a process to leave. Windows has no SIGHUP.
STOPPING = [getattr(signal, x) for x in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, x)]


class RunError(Exception):
    """Ends a run with one line for the user; `status` is the exit status of the process."""

    status = 1


def do(name: str, work: Callable[[], None]) -> int:
    """Does the work of a command, and prints an error as one line.

    Args:
        name: The name of the command; the lines begin with it.
        work: If it raises a RunError, the error's status is returned.

    Returns:
        The exit status.
    """

    def leave(number, frame):
        _hang_up(number)
        if number not in _left_by:
            _left_by.append(number)
            # Not `print`: the signal may have interrupted a print.
            os.write(2, f"{name}: stopped by {signal.Signals(number).name}.\n".encode())
        if _loads_native_code():  # It aborts the process when Python raises an error in it.
            os._exit(128 + number)
        sys.exit(128 + number)

    for number in _heard():
        # Until `StopSignals` takes the signals over, when there is a state to save.
        signal.signal(number, leave)
    if hasattr(signal, "SIGXFSZ"):
        # A file that grows too long must be an error, not a signal. Python ignores the signal, but
        # LLVM resets that when it compiles.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
    for stream in (sys.stdout, sys.stderr):
        # A screen that lacks some letters must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.getcwd() not in sys.path:
        # For mechanisms and tasks of one's own. Last, so that no file there stands for a package.
        sys.path.append(os.getcwd())
    try:
        work()
    except ModuleNotFoundError as error:
        return _tell(name, f"{error.name} is not installed here. {_how_to_install(name)}")
    except RunError as error:
        return _tell(name, error, error.status)
    except OSError as error:
        # The output, maybe behind `>` or `|`, cannot be written, so later lines cannot either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # The reader has left, as in `train.py | head`.
            return 128 + 13  # SIGPIPE, which Windows does not have.
        return _tell(name, error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _tell(
            name,
            "out of memory: a smaller model or batch takes less, or "
            "config.optimizer.accumulate, or config.model.remat.",
        )
    return 0


def end(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Ends the process with the status of `main(argv)`."""
    sys.unraisablehook = _leave_all_the_same
    statuses: list[int] = []
    if getattr(atexit, "_ncallbacks", lambda: 1)() == 1:  # That of logging; no tool's.
        atexit.register(_leave, statuses)  # The first to register is the last to run.
    try:
        status = main(argv)
    except SystemExit as leaving:
        status = leaving.code
    except Exception as error:
        if not _left_by:
            raise
        status = _tell(argv[0], error)
    if _left_by or status in [128 + number for number in STOPPING]:
        # Threads of XLA that still compile may crash while Python exits.
        with contextlib.suppress(OSError):  # The reader may have left.
            sys.stdout.flush()
        os._exit(status)
    if isinstance(status, int | None):
        statuses.append(status or 0)
    sys.exit(status)


def _leave(statuses):
    """Leaves at once, when all threads and all that was registered later have ended.

    Python would first take apart all that it has imported, which takes up to a second.
    """
    logging.shutdown()  # Registered earlier, when logging was imported.
    with contextlib.suppress(OSError):  # Python tells that the reader has left.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # Closed by the shell.
                stream.flush()
        for status in statuses:
            os._exit(status)


_left_by: list[int] = []  # The signals that were printed.


def _tell(name, error, status=1):
    """Prints an error, and returns the status.

    After a signal the error only shows that work was interrupted; the signal was printed already.
    """
    if _left_by:
        return 128 + _left_by[-1]
    print(f"{name}: {error}", file=sys.stderr)
    return status


def _how_to_install(name):
    if name == "train.py":
        return "To set up and train: python -m pip install uv && python -m uv run train.py"
    return "It comes along where pip installs attention_jax."


def _loads_native_code() -> bool:
    """Whether jax, or what saves its arrays, is being imported. There is no state to save yet."""
    specs = [getattr(sys.modules.get(x), "__spec__", None) for x in ("jax", "orbax.checkpoint")]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _heard():
    """The signals to listen to: not a SIGHUP that `nohup` keeps off."""
    return [x for x in STOPPING if x != _SIGHUP or signal.getsignal(x) != signal.SIG_IGN]


_SIGHUP = getattr(signal, "SIGHUP", None)


def _hang_up(number):
    """After SIGHUP, discards all output if the terminal is gone.

    Else the next print would fail and end the run before it has saved.
    """
    if number != _SIGHUP:
        return
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _leave_all_the_same(unraisable):
    """Repeats a signal from a callback of the garbage collector, where Python ignores
    SystemExit."""
    if _left_by and isinstance(unraisable.exc_value, SystemExit):
        threading.Timer(0.01, os.kill, (os.getpid(), _left_by[-1])).start()
    else:
        sys.__unraisablehook__(unraisable)


class StopSignals:
    """Notes SIGTERM, SIGINT or SIGHUP in `number`; a second signal acts as it did before.

    Python handles signals only in the main thread; in other threads this does not change them.
    """

    def __init__(self):
        self.number: int | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in _heard():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number, frame):
        _hang_up(number)
        self.number = number
        self.__exit__()
        # Not `print`: the signal may have interrupted one. The newline leaves a progress bar.
        line = f"{signal.Signals(number).name}: stops after this epoch; a second one stops at once."
        with contextlib.suppress(OSError):
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}{os.linesep}".encode())


def prepare() -> None:
    """Sets up jax for a run."""
    # Hide "Unable to initialize backend 'tpu'" on machines without one.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    _keep_compiled_programs()


def _keep_compiled_programs():
    """Keeps compiled programs on the disk for the next process."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # XLA divides loops among the cores that it sees, and jax's key does not tell how many.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        path = os.path.join(cache, "attention_jax", f"{cores}_cores")
        jax.config.update("jax_compilation_cache_dir", path)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Addresses in memory differ in each process. The key still tells calls apart: see
        # `functional.mesh`.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    # On a full disk programs compile anew each time, and jax would print two lines for each.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def versions() -> dict[str, str]:
    """The versions of Python, of this package, and of packages that decide the numbers of a run."""
    import importlib.metadata
    import platform

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "attention_jax": __version__, **versions}


def say(*lines: str) -> None:
    """Prints lines without buffering."""
    print(*lines, sep="\n", flush=True)
