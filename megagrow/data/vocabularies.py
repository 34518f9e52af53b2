"""Two tokenizers compared by the texts of their tokens, whatever their ids and kinds.

A token stands for bytes: those of its piece, where byte-level BPE writes every byte as a character
(``Ġthe`` is `` the``), SentencePiece a blank as U+2581, and byte fallback a byte as ``<0x0A>``.
Tokens are the same if they are of the same kind (a piece, a single byte, a special token) and stand
for the same bytes.  A piece is split by the old tokenizer's own encoder, which treats it as the
middle of a text: without the blank that some tokenizers put before every text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megagrow.data.tokenizer import tokenizers_library
from megagrow.errors import DataError

_BLANK = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Appended to a SentencePiece model (a protobuf message, whose later fields override earlier ones):
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
_MIDDLE_OF_TEXT = bytes([0x1A, 4, 0x18, 0, 0x20, 0])

Kind = Literal["piece", "byte", "special"]


@dataclass(frozen=True)
class Token:
    """What a token stands for.

    Attributes:
        kind: a piece of text; a byte that is a token by itself, beside pieces; a special token.
        text: the bytes; of a special token its name.
    """

    kind: Kind
    text: bytes

    def __str__(self) -> str:
        """For messages."""
        text = self.text.decode(errors="backslashreplace")
        return text if self.kind == "special" else repr(text)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer file.

    Attributes:
        path: the file.
        tokens: by id; None where an id has no token.
        encode: ids of a text as the middle of a longer one, special tokens' names taken as text.
        unknown: the id of the unknown token, if there is one.
    """

    path: Path
    tokens: tuple[Token | None, ...]
    encode: Callable[[str], list[int]]
    unknown: int | None

    def ids(self) -> dict[Token, int]:
        """The first id of each token."""
        found: dict[Token, int] = {}
        for number, token in enumerate(self.tokens):
            if token is not None:
                found.setdefault(token, number)
        return found


@dataclass(frozen=True)
class Matched:
    """The tokens of a new tokenizer in terms of an old one.

    Attributes:
        carried: by new id, the old id with the same token.
        pieces: by new id, the old ids into which the old tokenizer splits the new token's text.
        unsplit: new ids whose text the old tokenizer does not know.
        dropped: old ids whose token the new tokenizer does not have.
        free: the ids without a token, of the old and of the new tokenizer.
    """

    carried: Mapping[int, int]
    pieces: Mapping[int, Sequence[int]]
    unsplit: tuple[int, ...]
    dropped: tuple[int, ...]
    free: tuple[tuple[int, ...], tuple[int, ...]]


def matched(old: Vocabulary, new: Vocabulary) -> Matched:
    """Compare two vocabularies; see the module."""
    known, here = old.ids(), new.ids()
    carried: dict[int, int] = {}
    pieces: dict[int, list[int]] = {}
    unsplit, free = [], []
    for number, token in enumerate(new.tokens):
        if token is None:
            free.append(number)
        elif (same := _same(token, known, unless=here)) is not None:
            carried[number] = same
        elif parts := _split(token.text, old, known):
            pieces[number] = parts
        else:
            unsplit.append(number)
    kept = set(carried.values())
    dropped = tuple(
        number
        for number, token in enumerate(old.tokens)
        if token is not None and number not in kept and known[token] not in kept
    )
    before = tuple(number for number, token in enumerate(old.tokens) if token is None)
    return Matched(carried, pieces, tuple(unsplit), dropped, (before, tuple(free)))


def _same(token: Token, known: Mapping[Token, int], *, unless: Mapping[Token, int]) -> int | None:
    found = known.get(token)
    if found is None and token.kind != "special" and len(token.text) == 1:
        # A byte is a piece of byte-level BPE, and a token of its own beside pieces elsewhere.
        other = Token("byte" if token.kind == "piece" else "piece", token.text)
        found = None if other in unless else known.get(other)
    return found


def _split(text: bytes, old: Vocabulary, known: Mapping[Token, int]) -> list[int]:
    """The old ids of a text; empty if the old tokenizer does not know all of it."""
    try:
        ids = old.encode(text.decode())
    except UnicodeDecodeError:  # a part of a character
        single = [_same(Token("byte", bytes([byte])), known, unless={}) for byte in text]
        ids = [number for number in single if number is not None]
        return ids if len(ids) == len(text) else []
    return [] if old.unknown in ids else ids


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a SentencePiece ``.model`` or a Hugging Face ``tokenizer.json``.

    Raises:
        DataError: it cannot be read, or what its tokens stand for is not known.
    """
    try:
        return _sentencepiece(path) if path.suffix == ".model" else _hugging_face(path)
    except DataError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, or bare Exception
        raise DataError(
            f"{path}: cannot be read as a tokenizer",
            found=str(error)[:300],
            expected="a SentencePiece .model or a Hugging Face tokenizer.json",
        ) from error


def _sentencepiece(path: Path) -> Vocabulary:
    content = path.read_bytes()
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
    middle: Any = sentencepiece.SentencePieceProcessor(model_proto=content + _MIDDLE_OF_TEXT)

    def token(number: int) -> Token | None:
        name = model.id_to_piece(number)
        if model.is_unused(number):
            return None
        if model.is_control(number) or model.is_unknown(number):
            return Token("special", name.encode())
        if model.is_byte(number):
            return Token("byte", bytes([int(name[1:-1], 16)]))
        return Token("piece", name.replace(_BLANK, " ").encode())

    of_blank = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _BLANK.encode()]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        # The character that stands for a blank inside the model is no blank in a text.
        for number, part in enumerate(text.split(_BLANK)):
            ids += of_blank if number else []
            ids += middle.encode(part)
        return ids

    unknown = int(model.unk_id())
    count = int(model.get_piece_size())
    return Vocabulary(
        path, tuple(map(token, range(count))), encode, unknown if unknown >= 0 else None
    )


def _hugging_face(path: Path) -> Vocabulary:
    tokenizers = tokenizers_library(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    text_of = _text_of(content, path)
    whole: Any = tokenizers.Tokenizer.from_str(json.dumps(content))
    added = whole.get_added_tokens_decoder()
    names = {number: name for name, number in whole.get_vocab(with_added_tokens=True).items()}
    tokens: list[Token | None] = [None] * (max(names, default=-1) + 1)
    for number, name in names.items():
        if number in added:
            kind: Kind = "special" if added[number].special else "piece"
            tokens[number] = Token(kind, added[number].content.encode())
        else:
            tokens[number] = text_of(name)
    middle: Any = tokenizers.Tokenizer.from_str(json.dumps(_middle_of_text(content)))
    middle.no_truncation()
    middle.no_padding()
    middle.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return list(middle.encode(text, add_special_tokens=False).ids)

    unknown = content["model"].get("unk_token")
    number = whole.token_to_id(unknown) if isinstance(unknown, str) else None
    if number is None and isinstance(content["model"].get("unk_id"), int):
        number = content["model"]["unk_id"]
    return Vocabulary(path, tuple(tokens), encode, number)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, those of sequences included."""
    if isinstance(part, Mapping):
        yield part
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(key, ()):
                yield from _steps(inner)


def _text_of(content: Mapping[str, Any], path: Path) -> Callable[[str], Token]:
    """What a name in the vocabulary of a tokenizer.json stands for.

    Raises:
        DataError: its kind of model marks words in a way that is not known here.
    """
    model = content["model"]
    steps = [
        step
        for key in ("normalizer", "pre_tokenizer", "decoder")
        for step in _steps(content.get(key))
    ]
    types = {step.get("type") for step in steps}
    marks = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if model.get("type") not in ("BPE", "Unigram") or any(marks):
        raise DataError(
            f"{path}: it is not known what text the tokens of this kind of tokenizer stand for",
            found=f"a model of type {model.get('type')}"
            + (", which marks parts of words" if any(marks) else ""),
            expected="BPE without such marks, or Unigram",
            fix="prepare the data with a tokenizer of that kind",
        )
    if "ByteLevel" in types:
        table = {character: byte for byte, character in _byte_characters().items()}

        def byte_level(name: str) -> Token:
            if not all(character in table for character in name):
                return Token("piece", name.encode())
            text = bytes(table[character] for character in name)
            alone = len(text) == 1 and text[0] >= 0x80
            return Token("byte" if alone else "piece", text)

        return byte_level
    blank = "Metaspace" in types or any(
        step.get("type") == "Replace" and _BLANK in (step.get("content"), _pattern(step))
        for step in steps
    )
    fallback = bool(model.get("byte_fallback"))

    def by_name(name: str) -> Token:
        byte = _BYTE.fullmatch(name) if fallback else None
        if byte:
            return Token("byte", bytes([int(byte[1], 16)]))
        return Token("piece", (name.replace(_BLANK, " ") if blank else name).encode())

    return by_name


def _pattern(step: Mapping[str, Any]) -> Any:
    pattern = step.get("pattern")
    return pattern.get("String") if isinstance(pattern, Mapping) else None


def _byte_characters() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones as they are, the others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in kept)
    made = {byte: chr(0x100 + at) for at, byte in enumerate(others)}
    return {byte: made.get(byte, chr(byte)) for byte in range(256)}


def _middle_of_text(content: Any) -> Any:
    """A tokenizer.json without what it puts before a text."""
    if isinstance(content, list):
        return [_middle_of_text(item) for item in content if not _prepends(item)]
    if not isinstance(content, dict):
        return content
    changed = {}
    for key, value in content.items():
        if key in ("model", "added_tokens"):
            changed[key] = value
        elif key == "add_prefix_space":
            changed[key] = False
        elif key == "prepend_scheme":
            changed[key] = "never"
        else:
            changed[key] = None if _prepends(value) else _middle_of_text(value)
    return changed


def _prepends(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "Prepend"
