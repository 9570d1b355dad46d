"""The parser of the laboratory's commands."""

import argparse
import codecs

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


def read_text(words: str, flag: str) -> str:
    """`read_words` as a text; lone surrogates stand for bytes that are no UTF-8."""
    content = read_words(words, flag).removeprefix(codecs.BOM_UTF8)
    return content.decode(errors="surrogateescape")


def check_read(flag: str, unread: str) -> None:
    """Raises ValueError unless a vocabulary has tokens for all of a flag's text."""
    if unread:
        raise ValueError(f"{flag}: the model has no tokens for {unread[:20]!r}.")
