"""Trains an attention model: flags -> config -> experiment.run.

`python train.py` runs the defaults, `python train.py --help` lists the flags.
"""

import os
import signal
import sys

from attention_jax.training import config


def main(argv: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until the run has something to save; then it takes them over.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        command = config.parse(argv)
        # Not before the flags: a refusal and --help must not wait for jax.
        from attention_jax.training import experiment

        experiment.run(command.config, command.workdir)
    except EOFError:
        print("\nNo more answers: nothing was trained.")
    except BrokenPipeError:
        # The reader of our lines has left, `train.py | head` say; nor can the rest be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except config.RunError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
