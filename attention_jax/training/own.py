"""Parts of one's own, named by where Python finds them: "package.module:name". Imports no jax."""

import importlib
import inspect
import operator
import traceback
from typing import Any


def is_path(text: Any) -> bool:
    """Whether a text is of the form "package.module:name".

    >>> is_path("lab.mixing:mean"), is_path("lab/mixing.py:mean"), is_path("mean")
    (True, False, False)
    """
    if not isinstance(text, str):
        return False
    halves = text.split(":")
    return len(halves) == 2 and all(
        word.isidentifier() for half in halves for word in half.split(".")
    )


def find(path: str, name: str) -> Any:
    """What a path names.

    Args:
        path: "package.module:name". Python looks for the module where it always does; the commands
            look in the current directory too, last.
        name: What the user calls the path, for the error.

    Raises:
        ValueError: The module cannot be imported, or has no such name.
    """
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # The user's program may raise anything.
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{name}={path}: {module} cannot be imported: {words.rstrip('.')}{_where(error)}."
        ) from error
    try:
        return operator.attrgetter(attribute)(found)
    except AttributeError as error:
        place = getattr(found, "__file__", None) or "no file"
        raise ValueError(f"{name}={path}: {module} ({place}) has no {attribute}.") from error


def _where(error):
    """The last line of the user's that was reached; nothing if none was."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""


def check_call(function: Any, name: str, *arguments: str, **options: Any) -> None:
    """Raises unless a function can be called with these arguments and options.

    Args:
        function: Of the user.
        name: What the user calls it, for the error.
        arguments: The names of the positional arguments.
        options: The keyword arguments.

    Raises:
        TypeError: It is not callable, lacks an argument, or needs more.
    """
    if not callable(function):
        raise TypeError(f"{name} must be a function, got a {type(function).__name__}.")
    try:
        inspect.signature(function).bind(*arguments, **options)
    except (TypeError, ValueError) as error:  # The latter: it has no signature.
        given = ", ".join([*arguments, *(f"{word}={x}" for word, x in options.items())])
        wanted = f"take ({given})" if given else "have a default for each argument"
        raise TypeError(f"{name} must {wanted}: {error}.") from error


def task_settings(path: str, name: str) -> dict[str, Any]:
    """The settings of the builder of a task: its keyword arguments, with their defaults.

    Raises:
        ValueError, TypeError: As `find`; or an argument cannot be a field of the config.
    """
    builder, name = find(path, name), f"{name}={path}"
    check_call(builder, name)
    settings = {}
    for word, parameter in inspect.signature(builder).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name} must list its settings by name, got {parameter}.")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{name} must take {word} as a keyword.")
        if type(parameter.default) not in (bool, int, float, str) or word == "name":
            raise TypeError(
                f"{name} must have settings, other than name, whose defaults are numbers, True or "
                f"False, or texts: got {parameter}."
            )
        settings[word] = parameter.default
    if type(settings.get("seq_length")) is not int:
        raise TypeError(f"{name} must have a setting seq_length, an integer.")
    return settings
