"""Text as tokens and back: characters, bytes, or the tokens of a `tokenizer.json`."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Characters:
    """A token for each character.

    Attributes:
        letters: The characters; the token of each is its place.
    """

    def __init__(self, letters: str):
        self.letters = letters
        self._places = {letter: place for place, letter in enumerate(letters)}

    @property
    def size(self) -> int:
        return len(self.letters)

    def encode(self, text: str) -> np.ndarray:
        """`[T]` int32; ValueError names the characters that there are not."""
        try:
            return np.array([self._places[letter] for letter in text], np.int32)
        except KeyError:
            raise ValueError(
                f"the text must be of the {self.size} characters that training has seen: got "
                f"{self.unread(text)[:20]!r}."
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens beyond the characters, which a larger model may write, are left out."""
        return "".join(self.letters[token] for token in tokens if token < self.size)

    def name(self, token: int) -> str:
        """What a token stands for, as a label."""
        return self.letters[token]

    def unread(self, text: str) -> str:
        """What of a text has no token; "" if all has one."""
        return "".join(dict.fromkeys(x for x in text if x not in self._places))

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": "characters", "letters": self.letters}

    @property
    def definition(self) -> str:
        """The contents of a `tokenizer.json` with the same tokens."""
        return _definition(
            {"type": "WordLevel", "vocab": self._places, "unk_token": "<unknown>"},  # Not in it.
            {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            decoder={"type": "Fuse"},
            normalizer={"type": "Replace", "pattern": {"Regex": r"\r\n?"}, "content": "\n"},
        )


class Bytes:
    """A token for each byte of UTF-8."""

    size = 256

    def encode(self, text: str) -> np.ndarray:
        """Lone surrogates stand for bytes that are no UTF-8, as in `os.fsdecode`."""
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Tokens beyond the bytes are left out."""
        return bytes(token for token in tokens if token < self.size).decode(errors="replace")

    def name(self, token: int) -> str:
        """What a token stands for, as a label."""
        return chr(token) if token < 128 else f"\\x{token:02x}"

    def unread(self, text: str) -> str:
        """Bytes have a token for all."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": "bytes"}

    @property
    def definition(self) -> str:
        """The contents of a `tokenizer.json` with the same tokens."""
        # The library writes bytes that have no picture as letters from 256 on, as GPT-2 does.
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in seen]
        letters = dict(zip(seen, seen, strict=True)) | {x: 256 + i for i, x in enumerate(hidden)}
        level = {"type": "ByteLevel", "add_prefix_space": False}
        level |= {"trim_offsets": False, "use_regex": False}
        vocab = {chr(letters[byte]): byte for byte in range(256)}
        return _definition({"type": "BPE", "vocab": vocab, "merges": []}, level, decoder=level)


def _definition(model, pre_tokenizer, *, decoder, normalizer=None) -> str:
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    whole = {"version": "1.0", "added_tokens": [], "post_processor": None} | parts
    return json.dumps(whole | {"model": model}, ensure_ascii=False)


class Tokenizer:
    """The tokens of the library `tokenizers`.

    Args:
        definition: The contents of a `tokenizer.json`.

    Raises:
        ModuleNotFoundError: The library is not installed.
        ValueError: The contents are broken.
    """

    def __init__(self, definition: str):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a tokenizer.json needs the library tokenizers: "
                "pip install 'attention-jax[huggingface]'.",
                name="tokenizers",
            ) from error
        self.definition = definition
        try:
            self._coder = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # The library raises bare Exceptions.
            raise ValueError(f"the tokenizer.json is broken: {error}.") from error
        # As the file may do for the batches of another training.
        self._coder.no_padding()
        self._coder.no_truncation()

    @property
    def size(self) -> int:
        # The numbers may have gaps, so they are not counted.
        return max(self._coder.get_vocab().values(), default=-1) + 1

    @property
    def unknown(self) -> int | None:
        """The token of what it does not know, if it has one."""
        model = json.loads(self.definition)["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._coder.token_to_id(name)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_each([text])[0]

    def begin(self, text: str) -> np.ndarray:
        """`[T]` int32, with the special tokens that the file adds, as for the begin of a text."""
        return np.array(self._coder.encode(text).ids, np.int32)

    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ValueError: The tokenizer has no tokens for a text."""
        try:
            found = self._coder.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # The library raises bare Exceptions.
            raise ValueError(f"the tokenizer cannot encode the text: {error}.") from error
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._coder.decode(list(tokens), skip_special_tokens=False)

    def name(self, token: int) -> str:
        """What a token stands for, as a label."""
        return name_of_token(self._coder, token)

    def unread(self, text: str) -> str:
        """What of a text has no token; "" if all has one."""
        return unread(self._coder, text)

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": "tokenizer", "definition": self.definition}


Vocabulary = Characters | Bytes | Tokenizer


class Text(NamedTuple):
    """What a task of text says about its tokens.

    Attributes:
        name: Of the file, for people.
        vocabulary: Turns text into tokens and back.
        sha256: Of the bytes of the file.
        tokens_per_character: In the part that is held out. None: its tokenizer does not know all of
            the text.
        lines: Whether a row is a line: the token of the newline begins it and ends it.
    """

    name: str
    vocabulary: Vocabulary
    sha256: str
    tokens_per_character: float | None
    lines: bool

    def settings(self) -> dict[str, str]:
        """What else decides the numbers of a run: the hashes of the files that it reads."""
        found = {"the sha256 of config.task.path": self.sha256}
        if isinstance(self.vocabulary, Tokenizer):
            definition = self.vocabulary.definition.encode()
            found["the sha256 of config.task.tokens"] = hashlib.sha256(definition).hexdigest()
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it."""
        return self._asdict() | {"vocabulary": self.vocabulary.to_dict()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Text":
        """Raises ValueError unless `to_dict` has made it."""
        try:
            words = dict(found["vocabulary"])
            make = {"characters": Characters, "bytes": Bytes, "tokenizer": Tokenizer}
            vocabulary = make[words.pop("tokens")](*words.values())
            return cls(**dict(found) | {"vocabulary": vocabulary})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the vocabulary of the run cannot be read: {error!r}.") from error


def name_of_token(coder, token: int) -> str:
    """What a token of the library `tokenizers` stands for, as a label."""
    name = coder.id_to_token(token) or str(token)
    # A special token, as "<s>", would be left out and stand as a number among words.
    word = coder.decode([token], skip_special_tokens=False)
    if not word or "\ufffd" in word:  # A part of a letter.
        return name
    # SentencePiece's decoder takes the space of the first word away.
    return f" {word}" if name.startswith("▁") and not word.startswith(" ") else word


def unread(coder, text: str) -> str:
    """What a tokenizer of the library `tokenizers` reads as its unknown token, or leaves out."""
    found = coder.encode(text, add_special_tokens=False)
    unknown = getattr(coder.model, "unk_token", None)
    parts = [
        text[begin:end].strip()
        for name, token, (begin, end) in zip(found.tokens, found.ids, found.offsets, strict=True)
        # Unigram names its unknown token by the text that it stands for.
        if name == unknown or name != coder.id_to_token(token)
    ]
    parts = [part for part in parts if part != unknown]  # It may be written out.
    decoded = coder.decode(found.ids, skip_special_tokens=False)
    return " ".join(dict.fromkeys(parts)) or lost(text, decoded)


def lost(text: str, decoded: str) -> str:
    """The letters of a text that are not in what came back from its tokens.

    Case, accents and forms of letters do not count, because tokenizers may change them.
    """
    plain = lambda text: {
        x
        for x in unicodedata.normalize("NFKD", text).casefold()
        if not (x.isspace() or unicodedata.combining(x))
    }
    gone = plain(text) - plain(decoded)
    return "".join(dict.fromkeys(x for x in text if plain(x) & gone))


def make_vocabulary(tokens: str, text: str) -> Vocabulary:
    """The vocabulary that a setting names.

    Args:
        tokens: "characters", "bytes", or the path of a `tokenizer.json`.
        text: Whose characters count.

    Raises:
        ValueError: The setting is another, or the file is missing or broken.
        ModuleNotFoundError: The library `tokenizers` is not installed.
    """
    if tokens == "characters":
        return Characters("".join(sorted(set(text))))
    if tokens == "bytes":
        return Bytes()
    if not tokens.endswith(".json"):
        raise ValueError(
            f"tokens of text must be characters, bytes or the path of a tokenizer.json: got "
            f"{tokens!r}."
        )
    try:
        return Tokenizer(Path(tokens).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"tokens of text: {tokens} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"tokens of text: {tokens}: {error}") from error
