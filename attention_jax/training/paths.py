"""Paths as a user writes them. Nothing here imports jax."""

import os
import re
from pathlib import Path

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
