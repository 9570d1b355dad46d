"""Writes the parameters of a run to a file that other tools read.

    attention-jax export runs/first first.safetensors

RUN is the directory of a run, of a trial of a sweep (`sweep/trials/001`), or of a sweep, for its
best trial. Its newest checkpoint counts, also while the run goes on. FILE ends in .safetensors. The
names in it are the paths of the parameters, as `out.kernel`.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from attention_jax.laboratory.parser import Parser
from attention_jax.training.config import ConfigError
from attention_jax.training.files import CHECKPOINTS, local_path, locate


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: The run has no parameters, or the file cannot be written, in a line.
    """
    parser = Parser(argv[0], __doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a run, a sweep or a trial")
    parser.add_argument("file", metavar="FILE", help="file to write, or to write anew")
    try:
        options = parser.parse_args(argv[1:])
        params, step = export(options.run, options.file)
    except (OSError, RuntimeError, ValueError) as error:
        line = str(error)
        if isinstance(error, OSError) and error.filename == options.file:
            line = f"FILE cannot be written: {error.strerror}: {options.file}."
        raise ConfigError(line) from error
    count = sum(math.prod(array.shape) for array in params.values())
    print(f"{options.file} has the parameters of {options.run} at step {step}: {count:,} numbers.")


def export(run: str | os.PathLike, file: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """Writes the newest parameters of a run to a file of safetensors.

    Args:
        run: The directory of a run or of a trial; or of a complete sweep, for its best trial.
        file: Ends in `.safetensors`.

    Returns:
        The parameters by their paths, and their step.

    Raises:
        FileNotFoundError: There is no run or no checkpoint.
        ValueError: The file has another ending, the trial has diverged, or the sweep has no best
            trial.
        RuntimeError: All checkpoints of the run are broken.
        OSError: The file cannot be written.
    """
    path = local_path(file, "FILE")
    if path.suffix != ".safetensors":
        raise ValueError(f"FILE must end in .safetensors: got {file}.")
    place, _ = locate(local_path(run, "RUN"))
    if not (place / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{run} holds no run with a checkpoint.")
    # Imported after the checks, so that errors do not wait for jax.
    from attention_jax.interop import weights
    from attention_jax.training.checkpoint import read_params

    params, step = read_params(run)
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *above, last = name.split(".")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = array
    weights.save(path, tree)
    return params, step
