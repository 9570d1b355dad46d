"""Files of runs: paths that a user writes, JSON, and the places of trials. Imports no jax."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention_jax.training.process import RunError

CHECKPOINTS, TRIALS = "checkpoints", "trials"  # Inside a run's directory, or a sweep's.
VOCABULARY, SAMPLES = "vocabulary.json", "samples.txt"  # Of a task of text.
MODEL = "model.json"  # Of a model of Hugging Face: the small files of its directory.
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")  # Files of parameters alone.

# `gs://bucket/run`, also after a `Path` has taken a slash away. One letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(text: str | os.PathLike, name: str) -> Path:
    """A path of the local file system, `~` and `~user` expanded.

    Args:
        text: What the user wrote.
        name: What the user calls it, for the error.

    Raises:
        ValueError: The text is empty, is a URL, names an unknown user, or holds a NUL or letters
            that UTF-8 or the locale lacks.
        TypeError: It is no text.

    >>> local_path("runs/first", "--workdir").as_posix()
    'runs/first'
    """
    if not isinstance(text, str | os.PathLike) or not isinstance(os.fspath(text), str):
        raise TypeError(f"{name} must be a path: got {text!r}.")
    text = os.fspath(text)
    if not text:
        raise ValueError(f"{name} must be a path: got ''.")
    if "\0" in text:
        raise ValueError(f"{name} must be a path, which holds no NUL: got {text!r}.")
    if _URL.match(text):
        raise ValueError(f"{name} must be on a local file system, not a URL: got {text!r}.")
    try:
        text.encode()  # Checkpoints can be written only to UTF-8 paths.
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be in letters of the locale; PYTHONUTF8=1 has all: got {text!a}."
        ) from error
    expanded = os.path.expanduser(text)
    if expanded == text and text.startswith("~"):
        raise ValueError(f"{name} begins with a user that there is not: got {text!r}.")
    return Path(expanded)


def is_directory(name: str) -> bool:
    """Whether `config.model.name` is the path of a directory, which has a slash, and no word.

    >>> is_directory("./gpt2"), is_directory("multihead")
    (True, False)
    """
    return "/" in name or "\\" in name


def is_weights(path: Path) -> bool:
    """Whether a path names a file of parameters, and not the directory of a run."""
    return path.suffix in WEIGHTS and not path.is_dir()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file. None: there is no such file.

    Raises:
        ValueError: The file holds something else, or cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not of a run: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of a run: it holds no object.")
    return found


def is_hugging_face(path: Path) -> bool:
    """Whether a directory holds a model of Hugging Face, and no run."""
    try:
        found = read_json(path / "config.json") or {}
    except ValueError:
        return False
    return "model_type" in found and "config" not in found


def read_config(run: Path) -> dict[str, Any]:
    """The config in the directory of a run, a sweep or a trial.

    Raises:
        ValueError: There is no config, or it cannot be read.
    """
    file = run / "config.json"
    found = read_json(file)
    if found is None:
        raise ValueError(f"{file} is missing: there is no run.")
    if not isinstance(found.get("config"), dict):
        hint = " For a model of Hugging Face write interop.huggingface.load."
        words = hint if "model_type" in found else ""
        raise ValueError(f"{file} is not of a run: it holds no config.{words}")
    return found["config"]


def trial_directory(sweep: Path, number: int) -> Path:
    """The directory with the config, rows and result of a trial."""
    return sweep / TRIALS / f"{number:03}"


def locate(run: Path) -> tuple[Path, int | None]:
    """The directory whose checkpoints hold the parameters of a run, and the trial's number or None.

    The sweep's checkpoints hold its trials. A sweep means its best trial.

    Raises:
        ValueError: A sweep has no best trial: it is not complete, or all have diverged.
    """
    place = run.resolve()
    if not (place / CHECKPOINTS).is_dir():
        is_trial = place.parent.name == TRIALS and place.name.isdigit() and place.is_dir()
        return (place.parent.parent, int(place.name)) if is_trial else (run, None)
    if "sweep" not in ((read_json(run / "config.json") or {}).get("config") or {}):
        return run, None
    best = (read_json(run / "result.json") or {}).get("best")
    if not isinstance(best, int):
        raise ValueError(
            f"{run} is a sweep without a best trial: name a trial, as {trial_directory(run, 0)}."
        )
    return run, best


class Unwritable(RunError, OSError):
    """What a command has made cannot be written."""


def check_directory(path: Path, name: str) -> None:
    """Raises an error, before work that takes long, where `written_whole` could not write.

    Raises:
        ValueError: A file is in the directory's place.
        Unwritable: It may not be written, or not be made.
    """
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"{name} must be a directory: {path} is a file or below one.")
    if not os.access(place, os.W_OK):
        raise Unwritable(f"{name}={path} cannot be written.")


@contextlib.contextmanager
def written_whole(path: Path, name: str) -> Iterator[Path]:
    """A directory for what a command writes; its files then move to `path`, which is made.

    After an error, as on a full disk, those that were in `path` are as before.

    Raises:
        ValueError, Unwritable: As `check_directory`; or the disk is full.
    """
    check_directory(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path) as place:
            yield Path(place)
            for file in os.listdir(place):
                os.replace(Path(place, file), path / file)
    except OSError as error:
        raise Unwritable(f"{name}={path} cannot be written: {error.strerror or error}.") from error
