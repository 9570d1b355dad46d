"""Writes the parameters of a run for other tools.

    attention-jax export runs/first first.safetensors    the parameters, in one file
    attention-jax export runs/text my-model              a directory that transformers loads

RUN is the directory of a run, of a trial of a sweep (`sweep/trials/001`), or of a sweep, for its
best trial. Its newest checkpoint counts, also while the run goes on. The names in a file are the
paths of the parameters, as `out.kernel`. A directory has the files of Hugging Face: config.json,
model.safetensors and, of a run of text, tokenizer.json. It needs a model of a family that
transformers has, as runs of text have by default; `--task=text` with `--config.model.norm=rms
--config.model.mlp=swiglu` is a Llama.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax.laboratory.parser import Parser
from attention_jax.training.config import ConfigError
from attention_jax.training.files import (
    CHECKPOINTS,
    CONFIG,
    GENERATION,
    TOKENIZER,
    local_path,
    locate,
    written_whole,
)

_FILE = ".safetensors"


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: The run has no parameters, or the file cannot be written, in a line.
    """
    parser = Parser(argv[0], __doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a run, a sweep or a trial")
    parser.add_argument("out", metavar="OUT", help="file to write, also anew; or a new directory")
    try:
        options = parser.parse_args(argv[1:])
        if options.out.endswith(_FILE):
            params, step = export(options.run, options.out)
            what = f"the parameters of {options.run} at step {step}"
            count = sum(math.prod(array.shape) for array in params.values())
        else:
            kind, count = export_directory(options.run, options.out)
            what = f"the model of {options.run} as {kind} of transformers"
    except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
        line = str(error)
        if isinstance(error, OSError) and error.filename == options.out:
            line = f"OUT cannot be written: {error.strerror}: {options.out}."
        raise ConfigError(line) from error
    print(f"{options.out} has {what}: {count:,} numbers.")


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
    path = local_path(file, "OUT")
    if path.suffix != _FILE:
        raise ValueError(f"OUT must end in {_FILE}: got {file}.")
    _check_run(run)
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


def export_directory(run: str | os.PathLike, directory: str | os.PathLike) -> tuple[str, int]:
    """Writes the model of a run as a directory that transformers loads.

    A run of text also gives its `tokenizer.json`. In one of lines the newline begins and ends a
    text. A run that began with a directory of Hugging Face gives its files again: only the
    parameters are new.

    Args:
        run: As in `export`.
        directory: Is made, or is empty.

    Returns:
        The `model_type`, and how many numbers the parameters have.

    Raises:
        FileNotFoundError, RuntimeError: As `export`.
        NotImplementedError: No family of transformers has this model.
        ValueError: The directory is not empty; or as `export`.
        OSError: The directory cannot be written.
    """
    path = local_path(directory, "OUT")
    if not path.is_dir() and re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):
        raise ValueError(
            f"OUT must end in {_FILE}, or be a directory, which exists or has no such ending: got "
            f"{directory}."
        )
    if path.is_dir() and os.listdir(path):
        raise ValueError(f"OUT={directory} must be a new directory: it is not empty.")
    _check_run(run)
    import jax

    from attention_jax.interop import families, huggingface
    from attention_jax.training.loading import kept_model, load

    found, kept = load(run), kept_model(local_path(run, "RUN"))
    if found.task.vocab_size is None:
        raise NotImplementedError(
            f"{run}: the inputs of the task {found.task.name} are vectors, and transformers has no "
            "such model."
        )
    length, text, fields, files = found.config.task.seq_length, found.task.text, {}, {}
    if text is not None and text.lines:
        newline = int(found.encode("\n")[0])
        fields = {"bos_token_id": newline, "eos_token_id": newline}
    if text is not None:
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
        definition = text.vocabulary.definition
        parts = json.loads(definition)
        if parts.get("post_processor") and not found.config.init_from:
            # It adds special tokens, and training has shown none to the model.
            definition = json.dumps(parts | {"post_processor": None}, ensure_ascii=False)
        files = {TOKENIZER: definition, "tokenizer_config.json": _json(names)}
    if kept is None:
        if found.model.positions is None:  # Else their number is a field already.
            fields["max_position_embeddings"] = length
        try:
            kind, *_ = families.describe(found.model)
        except NotImplementedError as error:
            raise NotImplementedError(f"{run}: {error}") from error
    else:
        described = kept.pop(CONFIG)
        kind = described["model_type"]
        if GENERATION in kept:
            kept[GENERATION] |= fields
        files |= {name: _json(content) for name, content in kept.items()}
    with written_whole(path, "OUT") as place:
        if kept is None:
            huggingface.save(place, found.model, found.params, **fields)
        else:
            huggingface.save_as(place, described | fields, found.params)
        for name, content in files.items():
            (place / name).write_text(content, encoding="utf-8")
    return kind, sum(x.size for x in jax.tree.leaves(found.params))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _check_run(run: str | os.PathLike) -> None:
    place, _ = locate(local_path(run, "RUN"))
    if not (place / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{run} holds no run with a checkpoint.")
