"""Files of runs: paths as a user writes them, JSON, and where a trial is. No jax is imported."""

import json
import os
import re
from pathlib import Path
from typing import Any

# `gs://bucket/run`, also after a `Path` has taken a slash away. One letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(text: str | os.PathLike, name: str) -> Path:
    """A path of the local file system, `~` and `~user` expanded.

    Args:
        text: What the user wrote.
        name: What the user calls it, for the error.

    Raises:
        ValueError: The text is empty, is a URL, names a user that there is not, or holds a NUL.
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
    path = Path(os.path.expanduser(text))
    if path.parts[0].startswith("~") and text.startswith("~"):
        raise ValueError(f"{name} begins with a user that there is not: got {text!r}.")
    return path


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


def read_config(run: Path) -> dict[str, Any]:
    """The config that a run noted in its directory, or a sweep, or a trial of one.

    Raises:
        ValueError: There is none, or none that can be read.
    """
    file = run / "config.json"
    found = read_json(file)
    if found is None:
        raise ValueError(f"{file} is missing: there is no run.")
    if not isinstance(found.get("config"), dict):
        raise ValueError(f"{file} is not of a run: it holds no config.")
    return found["config"]
