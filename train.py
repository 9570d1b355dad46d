"""Trains an attention model: flags -> config -> experiment.run.

`python train.py` runs the defaults, `python train.py --help` lists the flags.
"""

import contextlib
import os
import signal
import sys


def main(argv: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until the run has something to save; then it takes them over.
        signal.signal(number, _leave)
    if hasattr(signal, "SIGXFSZ"):
        # A file that grows too long is an error to tell. Python ignores the signal, and LLVM, when
        # it compiles, no longer does.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
    try:
        return _train(argv)
    except ModuleNotFoundError as error:
        print(
            f"train.py: {error.name} is not installed here. To set up and train: "
            "python -m pip install uv && python -m uv run train.py",
            file=sys.stderr,
        )
        return 1


def _train(argv):
    from attention_jax.training import config
    from attention_jax.training.command import parse

    try:
        command = parse(argv)
        try:
            # Not before the flags: a refusal and --help must not wait for jax.
            from attention_jax.training import experiment
        except ValueError as error:  # jax reads its JAX_ variables when it is imported.
            raise config.ConfigError(f"in the environment: {error}.") from error
        if command.sweep:
            from attention_jax.laboratory import sweep

            sweep.run(command.config, command.sweep, command.workdir)
        else:
            experiment.run(command.config, command.workdir)
    except EOFError:
        print("\nNo more answers: nothing was trained.")
    except config.RunError as error:
        return _tell(error, error.status)
    except OSError as error:
        # Of the screen's, or of what stands behind `>` or `|`; nor can the rest be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # The reader has left, `train.py | head` say.
            return 128 + 13  # SIGPIPE, which Windows does not have.
        return _tell(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _tell(
            "out of memory: a smaller model or batch takes less, or "
            "config.optimizer.accumulate, or config.model.remat."
        )
    return 0


def _tell(error, status=1):
    """Prints an error, and returns the status.

    After a signal to leave an error is of what the signal cut short; the signal has been told.
    """
    if _left_by:
        return 128 + _left_by[-1]
    print(f"train.py: {error}", file=sys.stderr)
    return status


_left_by: list[int] = []  # The signals that were told to the user.


def _leave(number, frame):
    if number not in _left_by:
        _left_by.append(number)
        # Not `print`, which may be what the signal interrupts.
        os.write(2, f"train.py: stopped by {signal.Signals(number).name}.\n".encode())
    sys.exit(128 + number)


def _leave_all_the_same(unraisable):
    """Repeats a signal that came in a callback of the garbage collector, where Python ignores
    exceptions, that of leaving too."""
    if _left_by and isinstance(unraisable.exc_value, SystemExit):
        import threading

        threading.Timer(0.01, os.kill, (os.getpid(), _left_by[-1])).start()
    else:
        sys.__unraisablehook__(unraisable)


def _exit(argv):
    """Ends the process with the status of `main`."""
    sys.unraisablehook = _leave_all_the_same
    try:
        status = main(argv)
    except SystemExit as leaving:
        status = leaving.code
    except Exception as error:
        if not _left_by:
            raise
        status = _tell(error)
    if _left_by or status in (130, 143):
        # Threads of XLA that still compile may crash while Python takes itself apart.
        with contextlib.suppress(OSError):  # The reader may have left.
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _exit(sys.argv)
