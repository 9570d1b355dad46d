"""Writes text with a trained model, and shows it as it is made.

    attention-jax generate runs/mine --prompt="Once upon" --tokens=500
    attention-jax generate gpt2 --prompt=FILE:start.txt --temperature=0.8 --top_k=200 --samples=3

RUN is the directory of a run of the task `text`, of a trial of a sweep (`sweep/trials/001`), or of
a sweep, for its best trial; or one of Hugging Face with a `tokenizer.json`. `--prompt=FILE:PATH`
reads the prompt from a file. The same seed gives the same text.

The model sees as many tokens as it was trained on. When they are full, the last half stays and is
read anew, so a text may be of any length.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention_jax.laboratory.inspect import is_run
from attention_jax.laboratory.parser import Parser, as_text, check_read, read_words
from attention_jax.training.config import ConfigError
from attention_jax.training.files import CONFIG, GENERATION, TOKENIZER, local_path, read_json
from attention_jax.training.metrics import harmless

TOKENS, CHUNK = 500, 8


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: The model or an option is invalid, in a line.
    """
    parser = Parser(argv[0], __doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a run, or one of Hugging Face")
    parser.add_argument("--prompt", default="", help="text to continue, or FILE:PATH")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"how many; default: {TOKENS}")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 is the likeliest; default: 0.8"
    )
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest, up to this sum")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument("--samples", type=int, default=1, help="how many texts; default: 1")
    parser.add_argument("--context", type=int, help="tokens that the model sees at most")
    parser.add_argument(
        "--end", help="stop before this text of one token; \\n: a line's end; of lines: the default"
    )
    try:
        options = vars(parser.parse_args(argv[1:]))
        # A file gets the text as it is.
        shown = harmless if sys.stdout is not None and sys.stdout.isatty() else str
        for number, sample in enumerate(write(**options)):
            first = next(sample)  # Before the heading: it may raise an error.
            if options["samples"] > 1 and not _writes_lines(options["run"]):
                print(f"{'' if number == 0 else chr(10)}--- {number + 1}", flush=True)
            for part in itertools.chain([first], sample):
                print(shown(part), end="", flush=True)
            print(flush=True)
    except (
        *(RuntimeError, ValueError, TypeError, NotImplementedError, FileNotFoundError),
        FloatingPointError,
    ) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        line = " ".join(str(error).split())
        # Those of `attention_jax.generate` name its arguments.
        is_flag = line.startswith(("temperature", "top_k", "top_p", "context"))
        raise ConfigError(f"--{line}" if is_flag else line) from error


def write(
    run: str | os.PathLike,
    prompt: str = "",
    *,
    tokens: int = TOKENS,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    samples: int = 1,
    context: int | None = None,
    end: str | None = None,
) -> Iterator[Iterator[str]]:
    """Yields texts, each part by part: first the prompt, then what the model writes.

    Args:
        run: The directory of a run of text, a trial or a sweep; or one of Hugging Face.
        prompt: The text to continue. "": a run begins after a newline, a model of Hugging Face
            after its first token. "FILE:PATH": what stands in the file.
        tokens: How many tokens to write; fewer where a line or the text ends.
        temperature, top_k, top_p: As in `attention_jax.generate`.
        seed: Of the draws.
        samples: How many texts.
        context: The most tokens that the model sees. None: as many as it was trained on.
        end: Text of one token. Writing stops before it, as it does before the end of a line in a
            run of lines, and before the end tokens of a model of Hugging Face.

    Raises:
        ValueError: An argument is out of its range, or there is no such model, or its tokens are of
            no text.
        FloatingPointError: The model's logits are NaN or infinite.
        OSError: A file cannot be read.
    """
    place = local_path(run, "RUN")
    for name, value, least in (("tokens", tokens, 0), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}: got {value}.")
    if seed >= 2**31:
        raise ValueError(f"--seed must be less than 2**31: got {seed}.")
    content = read_words(prompt, "--prompt")
    of_run = is_run(place)
    # Imported after the checks, so that errors do not wait for jax.
    import jax

    from attention_jax.generation import stream
    from attention_jax.training.process import prepare

    prepare()
    author = _of_run(place) if of_run else _of_directory(place)
    prompt = as_text(content, "--prompt", of_bytes=author.of_bytes, of_lines=author.of_lines)
    check_read("--prompt", author.unread(prompt))
    given = author.begin(prompt)
    if context is None:
        context = author.context
    elif author.context is not None and context > author.context:
        print(
            f"--context={context} is longer than what the model was trained on, {author.context} "
            "tokens: it may write worse beyond them.",
            file=sys.stderr,
        )
    ends = author.ends
    if end == "":
        raise ValueError("--end must be one token: got ''.")
    if end is not None:
        end = "\n" if end == "\\n" else end  # Which is hard to type.
        check_read("--end", author.unread(end))
        # A tokenizer may have one token for the start of a word, and one for all other places.
        size = author.model.embedding.num_embeddings
        found = {x for x in range(size) if author.decode([x]) == end}
        token = author.encode(end).tolist()
        if not found and len(token) != 1:
            raise ValueError(f"--end must be one token: {end!r} is {len(token)}.")
        ends = ends | found | set(token if len(token) == 1 else ())
    # Always threefry, so that the text does not depend on JAX's default.
    rng = jax.random.key(seed, impl="threefry2x32")

    def sample(number: int) -> Iterator[str]:
        parts = stream(
            author.model,
            author.params,
            given,
            tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rng=jax.random.fold_in(rng, number),
            context=context,
            end=sorted(ends) or None,
            chunk=CHUNK,
        )
        shown = prompt.encode(errors="surrogateescape").decode(errors="replace")
        yield shown[: _sure(shown, of_bytes=True)] if author.of_bytes else shown
        told = Told(author.decode, given.tolist(), author.of_bytes)
        for part in parts:
            new = np.asarray(part).tolist()
            # Behind an end token nothing else comes.
            yield told.add([token for token in new if token not in ends])
        yield told.rest()

    return map(sample, range(samples))


def _writes_lines(run: str) -> bool:
    """Whether each sample is a line, which needs no heading."""
    config = (read_json(local_path(run, "RUN") / "config.json") or {}).get("config") or {}
    return bool(config.get("task", {}).get("lines"))


class Told:
    """Text of tokens that come one after the other, as far as it is sure.

    Args:
        decode: From a list of tokens to text.
        before: The tokens of the prompt.
        of_bytes: Whether tokens are bytes; else they are those of letters or of a tokenizer. A
            prompt of these ends with a whole letter.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], before: Sequence[int], of_bytes: bool = False
    ):
        self._decode, self._of_bytes = decode, of_bytes
        self._tokens = self._last(before)
        known = decode(self._tokens)
        self._told = _sure(known, of_bytes) if of_bytes else len(known)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is new. A letter that is not complete waits for its other tokens."""
        self._tokens += tokens
        text = self._decode(self._tokens)
        sure = _sure(text, self._of_bytes)
        new = self._new(text[:sure])
        if sure == len(text) and len(self._tokens) > 200:  # Keeps a long text from taking long.
            self._tokens = self._last(self._tokens)
            self._told = len(self._decode(self._tokens))
        return new

    def rest(self) -> str:
        """What still waits."""
        return self._new(self._decode(self._tokens))

    def _new(self, text):
        new, self._told = text[self._told :], max(self._told, len(text))
        return new

    def _last(self, tokens):
        """Some of the last tokens, because new ones may depend on them, as a space at the start of
        a word does. They begin with a whole letter, if one begins near."""
        tokens = list(tokens)
        counts = range(8, min(16, len(tokens)) + 1)
        whole = (n for n in counts if "\ufffd" not in self._decode(tokens[-n:]))
        return tokens[-next(whole, 8) :]


def _sure(text: str, of_bytes: bool) -> int:
    """How much of a text will stay: U+FFFD at its end may become a letter."""
    complete = len(text.rstrip("\ufffd"))
    # A letter has up to four bytes. A tokenizer may decode all bytes in a row as U+FFFD as long as
    # the last of their letters is not complete.
    return max(complete, len(text) - 3) if of_bytes else complete


class Author(NamedTuple):
    """A model that writes.

    Attributes:
        model, params: As in `attention_jax.generate`.
        encode: From text to tokens, which may be none.
        begin: From the prompt to its tokens, `[T]` with T at least 1.
        decode: From tokens to text.
        unread: What of a text a tokenizer has no tokens for; "" if it has them.
        ends: The tokens that end a text.
        context: How many tokens it was trained on; None if this is not known.
        of_bytes: Whether tokens are bytes, so that a prompt may be any bytes.
        of_lines: Whether it writes one line.
    """

    model: Any
    params: Any
    encode: Callable[[str], np.ndarray]
    begin: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]
    unread: Callable[[str], str]
    ends: set[int]
    context: int | None
    of_bytes: bool = False
    of_lines: bool = False


def _of_run(place: Path) -> Author:
    from attention_jax.tasks.vocabulary import Bytes
    from attention_jax.training.loading import kept_model, load
    from attention_jax.training.watch import first_token

    run = load(place)
    text = run.task.text
    if text is None:
        raise ValueError(f"{place} is a run of {run.config.task.name}, whose tokens are no text.")
    first, length = first_token(text), max(2, run.config.task.seq_length)
    kept = kept_model(place) if run.config.init_from else None  # Else it knows only what it learnt.
    if kept is not None and not text.lines:
        return _of_hugging_face(place, run.model, run.params, text.vocabulary, kept, first, length)

    def begin(prompt):
        found = text.vocabulary.encode(prompt)
        # A line begins with the token of the newline.
        return np.concatenate([[first], found]) if text.lines or not len(found) else found

    return Author(
        model=run.model,
        params=run.params,
        encode=text.vocabulary.encode,
        begin=lambda prompt: begin(prompt).astype(np.int32),
        decode=text.vocabulary.decode,
        unread=text.vocabulary.unread,
        ends={first} if text.lines else set(),
        context=length,
        of_bytes=isinstance(text.vocabulary, Bytes),
        of_lines=text.lines,
    )


def _of_directory(place: Path) -> Author:
    from attention_jax.interop import huggingface
    from attention_jax.tasks.vocabulary import Tokenizer

    file = place / TOKENIZER
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    coder = Tokenizer(file.read_text(encoding="utf-8-sig"))
    model, params = huggingface.load(place)
    files = {name: read_json(place / name) or {} for name in (CONFIG, GENERATION)}
    return _of_hugging_face(place, model, params, coder, files)


def _of_hugging_face(place, model, params, vocabulary, files, first=None, length=0) -> Author:
    """A model of Hugging Face, as it is or after more training.

    Args:
        place: Its directory, for errors.
        model, params: As in `Author`.
        vocabulary: Of its tokenizer, or of others that it was trained on.
        files: Its small files, by their names.
        first: The token that an empty prompt begins with if the files name none.
        length: How many tokens at once it was trained on here.
    """
    from attention_jax.tasks.vocabulary import Bytes, Tokenizer

    config = files[CONFIG]
    # The file of generation counts first: chat models name more ends there.
    ends = files.get(GENERATION, {}).get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in ends):
        raise ValueError(f"{place}: eos_token_id must be a token or some, got {ends!r}.")
    begin = vocabulary.begin if isinstance(vocabulary, Tokenizer) else vocabulary.encode
    start = config.get("bos_token_id")
    start = first if start is None else start

    def begin_or_start(prompt):
        found = begin(prompt)
        if not len(found) and start is None:
            raise ValueError(f"--prompt must not be empty: {place} names no first token.")
        return np.array(found if len(found) else [start], np.int32)

    known = getattr(model.positions, "max_length", None) or config.get("max_position_embeddings")
    known = max(length, known if isinstance(known, int) else 0)
    return Author(
        model=model,
        params=params,
        encode=vocabulary.encode,
        begin=begin_or_start,
        decode=vocabulary.decode,
        unread=vocabulary.unread,
        ends={token for token in ends if 0 <= token < model.embedding.num_embeddings},
        context=known if known > 1 else None,
        of_bytes=isinstance(vocabulary, Bytes),
    )
