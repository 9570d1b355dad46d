"""`python -m attention_jax COMMAND ...`, and the script `attention-jax`."""

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

from attention_jax import __version__
from attention_jax.training import process

NAME = "attention-jax"


def train(argv: list[str]) -> int:
    """Trains an attention model: flags -> config -> experiment.run; returns the exit status.

    Args:
        argv: The name at the start of messages, then the flags.
    """

    def work():
        from attention_jax.training.command import parse
        from attention_jax.training.config import ConfigError

        try:
            command = parse(argv)
        except EOFError:
            print("\nNo more answers: nothing was trained.")
            return
        try:
            # Imported after the flags, so that errors and --help do not wait for jax.
            from attention_jax.training import hosts

            hosts.join(command.hosts)  # Before anything uses jax.
            from attention_jax.training import experiment
        except ValueError as error:  # jax reads its JAX_ variables on import.
            raise ConfigError(f"in the environment: {error}.") from error
        if command.sweep:
            from attention_jax.laboratory import sweep

            found = sweep.run(command.config, command.sweep, command.workdir).metrics
            if found["best"] is None:
                trials = len(found["trials"])
                raise process.RunError(f"the sweep has no best trial: all {trials} have diverged.")
        else:
            experiment.run(command.config, command.workdir)
        hosts.done()

    return process.do(argv[0], work)


def _of(name: str) -> Callable[[list[str]], int]:
    """The command that a module of the laboratory does; as `train`."""

    def command(argv: list[str]) -> int:
        def work():
            importlib.import_module(f"attention_jax.laboratory.{name}").main(argv)

        return process.do(argv[0], work)

    return command


COMMANDS = {
    "train": train,
    **{name: _of(name) for name in ("report", "inspect", "generate", "export", "check")},
}
_HELP = f"""usage: {NAME} COMMAND [--flag=value ...]

  train    train an attention model, or finish what a run has begun
  report   make a table and pictures of runs and sweeps
  inspect  look inside: maps of the heads, their scores, and what each is worth
  generate write text with a run of text, or with a model of Hugging Face
  export   write a run to a file of safetensors, or as a model for transformers
  check    compare every implementation of attention with float64 here

`{NAME} COMMAND --help` lists the flags.
"""


def main(argv: list[str]) -> int:
    """Runs the command after the program's name; returns the exit status."""
    name, *rest = argv[1:] or [""]
    if name in COMMANDS:
        return COMMANDS[name]([f"{NAME} {name}", *rest])

    def work():
        if name not in ("-h", "--help"):
            if name == "--version":
                print(f"{NAME} {__version__}", flush=True)
                return
            what = f"there is no command {name!r}" if name else "a command is missing"
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"{NAME} --help says more."
            error = process.RunError(f"{what}: {', '.join(COMMANDS)}. {hint}")
            error.status = 2
            raise error
        print(_HELP, end="", flush=True)

    return process.do(NAME, work)


def script() -> NoReturn:
    """The script `attention-jax`."""
    process.end(main, sys.argv)


if __name__ == "__main__":
    script()
