"""Tokenizers: SentencePiece models and Hugging Face ``tokenizer.json``.

A tokenizer trained by megagrow is lossless, whitespace included, which source code needs.
SentencePiece has three pitfalls in this respect:

* It trains line by line and never learns a piece with a line end or a tab in it.
  Byte fallback turns both into one byte token each.
* It rewrites white space: hence identity normalisation, no dummy prefix, no removal.
* It encodes a blank as U+2581 and so decodes a U+2581 of the text as a blank. megagrow encodes that
  character as its three byte tokens, which decode to itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece

from megagrow.data.cutting import at_line_ends, between_words, splits_between_words
from megagrow.data.files import sha256_file
from megagrow.data.markers import END_OF_DOCUMENT, Candidates, Markers, choose
from megagrow.errors import DataError

# 256 bytes, the unknown token and the end of a document; characters are added to that.
LEAST_VOCABULARY = 259
_BLANK = "\u2581"
_BLANK_BYTES = tuple(f"<0x{byte:02X}>" for byte in _BLANK.encode())
_MAX_LINE = 1 << 12  # characters, of at most 4 bytes
_TRAINER_THREADS = 4  # stored in the model file: fixed, so that its checksum is too
_PROBE = "  a \n\n\tb  \u00e9\U0001f600 \x00\r\n "


Ids = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """The tokenizer interface.

    Attributes:
        path: its file.
        vocab_size: one more than the largest token id.
        markers: the tokens around a document.
    """

    path: Path
    vocab_size: int
    markers: Markers

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""
        ...

    @property
    def start(self) -> int:
        """Id of the token before a document's text: its begin token, or the previous end token."""
        ...

    def name(self, token: int) -> str:
        """The name of a token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        ...

    def encode_parts(self, text: str) -> Iterator[Ids]:
        """The same as arrays, each for a bounded part of the text if the ids permit it."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the tokenizer's file."""
        ...


class _Marked:
    """Properties that follow from the document markers."""

    markers: Markers

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""
        return self.markers.eod

    @property
    def start(self) -> int:
        """Id of the token before a document's text: its begin token, or the previous end token."""
        return self.markers.eod if self.markers.bos is None else self.markers.bos


class SentencePieceTokenizer(_Marked):
    """A SentencePiece ``.model`` file."""

    def __init__(self, path: Path, eod: str | int | None, bos: str | int | None) -> None:
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as a SentencePiece model",
                found=str(error),
                fix="give --tokenizer an intact .model, or none to train one",
            ) from error
        self.vocab_size: int = self._model.get_piece_size()
        model = self._model
        controls = (token for token in range(self.vocab_size) if model.is_control(token))
        end = model.eos_id()
        offers = Candidates(
            path,
            {model.id_to_piece(token): token for token in controls},
            self._id,
            (None, end if end >= 0 and model.is_control(end) else None),
            lambda name, token: token in model.encode(name),
        )
        self.markers = choose(offers, eod=eod, bos=bos)

    def _id(self, name: str) -> int | None:
        token = self._model.piece_to_id(name)
        return int(token) if self._model.id_to_piece(token) == name else None

    def name(self, token: int) -> str:
        """The name of a token."""
        return str(self._model.id_to_piece(token))

    @cached_property
    def _blank_ids(self) -> list[int] | None:
        """Ids of the bytes of U+2581 if the model is lossless, else None."""
        model = self._model
        ids = [model.piece_to_id(name) for name in _BLANK_BYTES]
        pieces = (model.id_to_piece(token) for token in range(self.vocab_size))
        exact = (
            model.unk_id() not in ids
            # A prefix before every text would be repeated where a text is cut.
            and "".join(model.encode("a", out_type=str)) == "a"
            and model.decode(model.encode(_PROBE)) == _PROBE
            and not any("\n" in piece and piece != "\n" for piece in pieces)
        )
        return ids if exact else None

    @property
    def exact(self) -> bool:
        """Whether it is lossless, like those trained by megagrow."""
        return self._blank_ids is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return [token for part in self.encode_parts(text) for token in part.tolist()]

    def encode_parts(self, text: str) -> Iterator[Ids]:
        """The same as arrays, each for a part of the text if the model is lossless.

        Otherwise the whole text is one part, which takes about 30 times its size in memory, because
        rules may cross any border.
        """
        blank = self._blank_ids
        if blank is None:
            yield np.array(self._model.encode(text), np.int32)
            return
        for chunk in at_line_ends(text):
            ids: list[int] = []
            for number, fragment in enumerate(chunk.split(_BLANK)):
                if number:
                    ids += blank
                ids += self._model.encode(fragment)
            yield np.array(ids, np.int32)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; the document end decodes to nothing."""
        return str(self._model.decode([int(token) for token in ids]))

    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return sha256_file(self.path)


def tokenizers_library(path: Path) -> ModuleType:
    """The optional package `tokenizers`.

    Args:
        path: the file that it is to read, for the error.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"{path}: the package that reads tokenizer.json is not installed",
            found="no module 'tokenizers'",
            fix="pip install 'megagrow[hf]'",
        ) from error
    return tokenizers


class HuggingFaceTokenizer(_Marked):
    """A Hugging Face ``tokenizer.json``; needs the optional package ``tokenizers``."""

    def __init__(self, path: Path, eod: str | int | None, bos: str | int | None) -> None:
        tokenizers = tokenizers_library(path)
        self.path = path
        try:
            # The library raises bare Exception on every fault of the file.
            self._model: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise DataError(
                f"{path}: cannot be read as a Hugging Face tokenizer",
                found=str(error),
                fix="give --tokenizer an intact tokenizer.json",
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        # Text that looks like a special token stays text.
        self._model.encode_special_tokens = True
        self._splits = splits_between_words(self._model.to_str())
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        added: dict[int, Any] = self._model.get_added_tokens_decoder()
        offers = Candidates(
            path,
            {token.content: number for number, token in sorted(added.items()) if token.special},
            vocabulary.get,
            self._own(),
            lambda name, token: token in self.encode(name),
        )
        self.markers = choose(offers, eod=eod, bos=bos)

    def _own(self) -> tuple[int | None, int | None]:
        """The tokens that the post-processor adds before and after a text; a single token each."""
        ids, own = ([e.ids for e in self._model.encode_batch(["a"], add_special_tokens=add)]
                    for add in (False, True))  # fmt: skip
        plain, full = ids[0], own[0]
        before = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), None)
        if before is None:
            return None, None
        after = full[before + len(plain) :]
        return (full[0] if before == 1 else None), (after[0] if len(after) == 1 else None)

    def name(self, token: int) -> str:
        """The name of a token."""
        return str(self._model.id_to_token(token))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        # The fast path omits offsets, which would take most of the memory.
        [encoding] = self._model.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def encode_parts(self, text: str) -> Iterator[Ids]:
        """The same as arrays, each for a part of the text if that is known to be equivalent.

        Otherwise the whole text is one part, which takes more than a hundred times its size in
        memory.
        """
        for chunk in between_words(text) if self._splits else [text]:
            yield np.array(self.encode(chunk), np.int32)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens decode to nothing."""
        return str(self._model.decode([int(token) for token in ids], skip_special_tokens=True))

    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return sha256_file(self.path)


def load_tokenizer(
    path: str | Path, *, eod: str | int | None = None, bos: str | int | None = None
) -> Tokenizer:
    """Open a SentencePiece ``.model`` or a Hugging Face ``.json``.

    Args:
        path: the file.
        eod, bos: the document markers, by name or id, ``none`` for no ``bos``; default: see
            :mod:`megagrow.data.markers`.

    Raises:
        DataError: the file is missing, damaged, of another format, or does not define what ends a
            document.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file",
            fix="give the path of a SentencePiece .model or a Hugging Face tokenizer.json",
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eod, bos)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod, bos)
    raise DataError(
        f"{path}: unknown kind of tokenizer",
        found=f"suffix {path.suffix!r}",
        expected="a SentencePiece .model or a Hugging Face tokenizer.json",
    )


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a byte-pair model on ``texts``; returns the content of a ``.model`` file.

    The same texts in the same order give the same bytes.

    Raises:
        DataError: the vocabulary is too small for the bytes and characters, or
            too large for the texts.
    """
    require_vocabulary(vocab_size)
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=content,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _MAX_LINE,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        # A vocabulary that does not fit the corpus is reported only in this way.
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        most = re.search(r"too high \(\d+\).*<= (\d+)", str(error))
        if least:
            raise _unfit(vocab_size, f"at least {least[1]}: {_BYTES}", f"--vocab-size {least[1]}"
                         ) from error  # fmt: skip
        if most:
            raise _unfit(
                vocab_size,
                f"at most {most[1]}, which is what the text yields",
                f"--vocab-size {most[1]}, or more text",
            ) from error
        raise DataError(
            f"training a tokenizer of {vocab_size} tokens failed",
            found=str(error),
            fix="another --vocab-size, more text, or a ready --tokenizer",
        ) from error
    return content.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # Longer lines would be skipped.
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


_BYTES = "256 bytes, 2 special tokens and the characters of the text"


def require_vocabulary(size: int) -> None:
    """Raise DataError for a vocabulary that is impossible for any text, before reading any."""
    if size < LEAST_VOCABULARY:
        raise _unfit(
            size,
            f"at least {LEAST_VOCABULARY}: {_BYTES}",
            "a larger one, for instance --vocab-size 4096",
        )


def _unfit(size: int, expected: str, fix: str) -> DataError:
    return DataError(f"a tokenizer of {size} tokens cannot be trained", expected=expected, fix=fix)
