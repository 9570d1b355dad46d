"""The parser of the laboratory's commands."""

import argparse
import difflib
import re

from attention_jax.training.files import local_path

_FILE = "FILE:"


class Parser(argparse.ArgumentParser):
    """Shows a module's text as its help, and raises ValueError for a bad flag."""

    def __init__(self, name: str, text: str):
        summary, _, rest = text.partition("\n\n")
        super().__init__(
            name,
            description=summary,
            epilog=rest,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        if found := re.fullmatch(r"unrecognized arguments: (-[^ =]+).*", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(found[1], known, n=1)
            message = f"{found[1]} is unknown." + (f" Did you mean {close[0]}?" if close else "")
        elif found := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message):
            kind = {"int": "an integer", "float": "a number"}.get(found[2], found[2])
            message = f"{found[1]} must be {kind}: got {found[3]}."
        raise ValueError(message)


def read_words(words: str, flag: str) -> bytes:
    """The text of a flag, or of the file that `FILE:PATH` names; a file may hold any bytes.

    Raises:
        ValueError: The file cannot be read.
    """
    if not words.startswith(_FILE):
        return words.encode(errors="surrogateescape")
    file = local_path(words.removeprefix(_FILE), f"{flag}=FILE:PATH")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag}: {file} cannot be read: {error.strerror}.") from error


def as_text(content: bytes, flag: str, *, of_bytes: bool = False, of_lines: bool = False) -> str:
    """What `read_words` has read, as a text to learn from is read.

    Args:
        content: The bytes.
        flag: Named in errors.
        of_bytes: The model reads any bytes: lone surrogates stand for those that are no UTF-8.
        of_lines: The model reads one line: a newline at its end does not count.

    Raises:
        ValueError: It is no text in UTF-8, or must be one line.
    """
    if of_bytes:
        text = content.decode(errors="surrogateescape")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{flag} is no text in UTF-8, at byte {error.start:,}.") from error
    if of_lines or not of_bytes:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if of_lines and "\n" in (text := text.removesuffix("\n")):
        raise ValueError(f"{flag} must be one line, as the rows of the run are.")
    return text


def check_read(flag: str, unread: str) -> None:
    """Raises ValueError unless a vocabulary has tokens for all of a flag's text."""
    if unread:
        hint = f" A file can have newlines and tabs: {flag}=FILE:PATH." if "\\" in unread else ""
        raise ValueError(f"{flag}: the model has no tokens for {unread[:20]!r}.{hint}")
