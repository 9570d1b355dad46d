"""Text of one's own: the next token of a file, of which a tenth is held out."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.checks import as_size, check_flag
from attention_jax.tasks.task import Task, per_row
from attention_jax.tasks.vocabulary import Bytes, Characters, Text, Tokenizer, make_vocabulary
from attention_jax.types import Array, Batch

MOST = 2**27  # Tokens of a file. They are part of each compiled program.
_TRAINED = 0.9


def text(
    *, seq_length: int = 64, path: str = "", tokens: str = "characters", lines: bool = False
) -> Task:
    """Names the next token at each position of a text.

    A row is a window of the file, drawn evenly from its first nine tenths:

        inputs    T o   b e   o r
        targets   o   b e   o r

    The rows held out are windows of the last tenth. With `lines=True` a row is a line, as in a file
    of names; the token of the newline begins and ends it. A tenth of the lines is held out, drawn
    once, because such files are often sorted:

        inputs    \\n e m m a
        targets   e  m m a \\n

    Args:
        seq_length: T; of lines, the longest line and its end must fit.
        path: The file, in UTF-8. "": the help topics of this Python, `pydoc_data.topics`.
        tokens: "characters", "bytes", or the path of a `tokenizer.json`, for the library
            `tokenizers`. With bytes, the file may be of any kind.
        lines: Whether each line that is not blank is a row.

    Returns:
        A token task with T labelled positions. Its `text` has the vocabulary. Baseline: each
        token's share of the text.

    Raises:
        ValueError: A setting is out of range, or the file is missing, empty, too short, too long or
            no text.
        ModuleNotFoundError: The library `tokenizers` is not installed.
    """
    seq_length = as_size("seq_length", seq_length)
    check_flag("lines", lines)
    for name, value in (("path", path), ("tokens", tokens)):
        if not isinstance(value, str):
            raise TypeError(f"{name} of text must be a text: got {value!r}.")
    source = _read(path, tokens, lines, _stamp(path), _stamp(tokens))
    task = _make_task(seq_length, source.text, lambda: source)
    _parts(source, seq_length)  # Raises an error if the text is too short.
    return task._replace(held_out=task.held_out + _unknown(source))


def kept_text(
    kept: Text, *, seq_length: int = 64, path: str = "", tokens: str = "characters", lines: bool
) -> Task:
    """The task that a run has learnt, also without its file.

    Its batches need the file, unchanged: until one is asked for, the file is not read.

    Args:
        kept: What the run has kept.
        seq_length, path, tokens, lines: As in `text`.
    """

    def source():
        vocabulary = kept.vocabulary
        words = "characters" if tokens.endswith(".json") else tokens
        try:
            content = _bytes(path)
        except ValueError as error:
            raise ValueError(f"{error} The run's rows are in it.") from error
        if hashlib.sha256(content).hexdigest() != kept.sha256:
            raise ValueError(f"{kept.name} has changed since the run was made, so its rows have.")
        letters = "" if words == "bytes" else _letters(content, kept.name)
        found = _encode(content, letters, vocabulary, lines)
        return _Source(kept, found, _ends(found, vocabulary, kept.name) if lines else None)

    return _make_task(seq_length, kept, functools.cache(source))


class _Source(NamedTuple):
    """A file that was read.

    Attributes:
        text: What is known of it.
        tokens: Of the whole file, `[N]`.
        ends: Where each line begins and ends, `[lines, 2]`, those held out last; None if rows are
            no lines.
    """

    text: Text
    tokens: np.ndarray
    ends: np.ndarray | None


def _stamp(path):
    """What changes when a file changes, so that a file is read once."""
    try:
        found = os.stat(Path(path).expanduser()) if path else None
    except (OSError, ValueError):
        return None
    return found and (found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _read(path, tokens, lines, *stamps) -> _Source:
    content = _bytes(path)
    name = Path(path).name if path else "pydoc_data.topics"
    letters = "" if tokens == "bytes" else _letters(content, name)
    vocabulary = make_vocabulary(tokens, letters)
    try:
        found = _encode(content, letters, vocabulary, lines)
    except ValueError as error:
        raise ValueError(f"tokens of text: {tokens}: {error}") from error
    if len(found) > MOST:
        raise ValueError(f"path of text: {name} has {len(found):,} tokens; at most {MOST:,} fit.")
    ends = _ends(found, vocabulary, name) if lines else None
    text = Text(
        name=name,
        vocabulary=vocabulary,
        sha256=hashlib.sha256(content).hexdigest(),
        tokens_per_character=_density(found, ends, letters, vocabulary),
        lines=lines,
    )
    return _Source(text, found, ends)


def _density(tokens, ends, letters, vocabulary) -> float | None:
    """How many tokens a character takes in the part that is held out.

    None: some stand for any characters, so that they say little of those.
    """
    unknown = vocabulary.unknown if isinstance(vocabulary, Tokenizer) else None
    if unknown is not None and (tokens == unknown).any():
        return None
    of = tokens if ends is None else ends
    trained = int(_TRAINED * len(of))
    held_out = tokens[trained:] if ends is None else _of_lines(tokens, ends[trained:])
    if isinstance(vocabulary, Characters) or not len(held_out):
        return 1.0
    if isinstance(vocabulary, Bytes):
        return len(held_out) / _count(held_out.tobytes())
    # Some decoders add spaces, so their letters tell the share alone.
    size = lambda tokens: len(vocabulary.decode(tokens.tolist()))
    share = size(held_out) / max(1, size(tokens))
    return len(held_out) / max(1.0, share * len(letters))


def _unknown(source) -> str:
    """A word on tokens that stand for anything, which are easy to name: losses are too low."""
    vocabulary = source.text.vocabulary
    if not isinstance(vocabulary, Tokenizer) or (token := vocabulary.unknown) is None:
        return ""
    share = np.mean(source.tokens == token)
    line = f"its tokenizer does not know {share:.1%} of the tokens"
    if share > 0.5:
        raise ValueError(f"path of text: {source.text.name} is in other words: {line}.")
    return f"; {line}, so there are no bits per character" if share else ""


def _count(content: bytes) -> int:
    """The number of characters; of bytes where they are no UTF-8."""
    try:
        # The first three bytes may be the rest of a character.
        rest = content[:3].lstrip(bytes(range(0x80, 0xC0)))
        return max(1, len((rest + content[3:]).decode()))
    except UnicodeDecodeError:
        return len(content)


def _bytes(path: str) -> bytes:
    if not path:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values()).encode()
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"path of text: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # A NUL in the path.
        raise ValueError(f"path of text: {path!r} is no path: {error}.") from error
    if not content:
        raise ValueError(f"path of text: {path} is empty.")
    return content


def _letters(content: bytes, name: str) -> str:
    try:
        letters = content.decode("utf-8-sig")
        fault, strange = "holds a NUL", content.find(b"\0")
    except UnicodeDecodeError as error:
        fault, strange = "is no text in UTF-8", error.start
    if strange >= 0:
        raise ValueError(
            f"path of text: {name} {fault}, at byte {strange:,}. tokens=bytes takes any file."
        )
    return letters.replace("\r\n", "\n").replace("\r", "\n")


def _encode(content: bytes, letters: str, vocabulary, lines: bool) -> np.ndarray:
    """The tokens of a file, in the smallest type, because they are part of each program."""
    if isinstance(vocabulary, Bytes):
        if lines:  # A line ends as in a text of letters.
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return np.frombuffer(content, np.uint8)
    sizes = (np.uint8, np.uint16)
    kind = next((x for x in sizes if vocabulary.size <= np.iinfo(x).max + 1), np.int32)
    if lines and isinstance(vocabulary, Tokenizer):
        # Each by itself: a tokenizer may join a newline with what stands beside it.
        newline = vocabulary.encode("\n")
        each = vocabulary.encode_each(letters.removesuffix("\n").split("\n"))
        return np.concatenate([x for line in each for x in (line, newline)]).astype(kind)
    return vocabulary.encode(letters).astype(kind)


def _ends(tokens, vocabulary, name):
    """Where each line that is not empty begins and ends, in an order of chance.

    The order is the same for the same number of lines.

    Args:
        tokens: Of a file, as `[line, newline, line, ...]`.
    """
    newline = _newline(vocabulary, name)
    ends = np.flatnonzero(tokens == newline)
    if len(tokens) and tokens[-1] != newline:
        ends = np.append(ends, len(tokens))
    begins = np.concatenate([[0], ends[:-1] + 1])
    found = np.stack([begins, ends], axis=1)[ends > begins].astype(np.int32)
    return found[np.random.RandomState(0).permutation(len(found))]


def _of_lines(tokens, ends):
    """The tokens of some lines and of their newlines, in the order of the file."""
    depth = np.zeros(len(tokens) + 2, np.int8)
    depth[ends[:, 0]] += 1
    depth[ends[:, 1] + 1] -= 1
    return tokens[np.cumsum(depth[: len(tokens)], dtype=np.int8) > 0]


def _newline(vocabulary, name) -> int:
    try:
        found = vocabulary.encode("\n")
    except ValueError as error:
        raise ValueError(f"lines of text: {name} has only one line.") from error
    if len(found) != 1 or vocabulary.decode(found.tolist()) != "\n":
        raise ValueError("lines of text: the tokenizer must have a token for the newline.")
    return int(found[0])


def _parts(source: _Source, seq_length: int) -> tuple[int, int]:
    """How many tokens, or lines, are for training and are held out; ValueError if too few."""
    of = source.tokens if source.ends is None else source.ends
    trained = int(_TRAINED * len(of))
    held_out = len(of) - trained
    if source.ends is None and min(trained, held_out) <= seq_length:
        raise ValueError(
            f"path of text: {source.text.name} is too short: of its {len(of):,} tokens the last "
            f"{held_out:,} are held out, and a row takes seq_length + 1 = {seq_length + 1}"
            + (f": a seq_length of {held_out - 1} fits." if held_out > 1 else ".")
        )
    if source.ends is not None:
        if min(trained, held_out) < 1:
            raise ValueError(
                f"path of text: {source.text.name} must have two lines or more: got {len(of)}."
            )
        sizes = of[:, 1] - of[:, 0]
        longest = int(sizes.argmax())
        if sizes[longest] >= seq_length:
            newline = _newline(source.text.vocabulary, source.text.name)
            number = 1 + np.count_nonzero(source.tokens[: of[longest, 0]] == newline)
            raise ValueError(
                f"seq_length of text must hold the longest line of {source.text.name}, which is "
                f"line {number}, and its end, {sizes[longest]} + 1 tokens: got {seq_length}."
            )
    return trained, held_out


def _make_task(seq_length: int, text: Text, source: Callable[[], _Source]) -> Task:
    def rows(of_part: Callable[[int, int], tuple[int, int]]):
        """Rows of a part of the text, `(first, end)` in tokens or in lines."""

        @per_row
        def sample(rng: Array) -> Batch:
            found = source()
            first, end = of_part(*_parts(found, seq_length))
            if found.ends is None:
                return window(rng, found.tokens, first, end)
            return line(rng, found, first, end)

        return sample

    def window(rng, tokens, first, end):
        start = jax.random.randint(rng, (), first, end - seq_length, jnp.int32)
        row = lax.dynamic_slice(jnp.asarray(tokens), (start,), (seq_length + 1,)).astype(jnp.int32)
        return Batch(row[:-1], row[1:], jnp.ones(seq_length, jnp.float32))

    def line(rng, found, first, end):
        newline = _newline(text.vocabulary, text.name)
        which = jax.random.randint(rng, (), first, end, jnp.int32)
        begin, stop = jnp.asarray(found.ends)[which]
        places = jnp.arange(-1, seq_length, dtype=jnp.int32)
        row = jnp.asarray(found.tokens)[begin + jnp.maximum(places, 0)].astype(jnp.int32)
        row = jnp.where((places >= 0) & (begin + places < stop), row, newline)
        weights = (places[1:] <= stop - begin).astype(jnp.float32)
        return Batch(row[:-1], row[1:], weights)

    def shares() -> np.ndarray:
        """-log of each token's share of the part for training, with one more of each."""
        found = source()
        trained, _ = _parts(found, seq_length)
        seen = found.tokens[:trained]
        if found.ends is not None:
            seen = _of_lines(found.tokens, found.ends[:trained])
        counts = np.bincount(seen, minlength=text.vocabulary.size) + 1.0
        return np.log(counts.sum() / counts).astype(np.float32)

    def baseline(batch: Batch) -> Array:
        losses = jnp.asarray(shares())[batch.targets]
        return (batch.weights * losses).sum() / batch.weights.sum()

    part = "a tenth of the lines" if text.lines else "windows of the last tenth"
    return Task(
        name="text",
        sample=rows(lambda trained, held_out: (0, trained)),
        loss="cross_entropy",
        inputs=None,
        vocab_size=text.vocabulary.size,
        baseline=("each token's share of the text", baseline),
        sample_held_out=rows(lambda trained, held_out: (trained, trained + held_out)),
        held_out=f"{part} of {text.name}",
        text=text,
    )
