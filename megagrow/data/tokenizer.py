"""Text to token ids and back: SentencePiece models and Hugging Face ``tokenizer.json``.

A tokenizer trained here gives back exactly the text it was given, whitespace
included, which source code needs.  SentencePiece has three traps on that way:

* It trains line by line and never learns a piece with a line end or a tab in it.
  Byte fallback turns both into one byte token each.
* It rewrites white space: so identity normalisation, no dummy prefix, no removal.
* It writes a blank as U+2581 and so reads a U+2581 of the text as a blank.  We
  spell that character with its three byte tokens, which decode to itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megagrow.data.files import sha256_file
from megagrow.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
# Names of the token that ends a document, in the order of preference.
_END_NAMES = (END_OF_DOCUMENT, "<eod>", "<|end_of_text|>", "</s>", "<eos>")
_BLANK = "\u2581"
_BLANK_BYTES = tuple(f"<0x{byte:02X}>" for byte in _BLANK.encode())
# SentencePiece's memory grows with the text: cut long documents at line ends.
_CHUNK_CHARACTERS = 1 << 20
_MAX_LINE = 1 << 12  # characters, of at most 4 bytes
_TRAINER_THREADS = 4  # part of the model file: fixed, so that its checksum is
_PROBE = "  a \n\n\tb  \u00e9\U0001f600 \x00\r\n "


class Tokenizer(Protocol):
    """What the program needs of a tokenizer.

    Attributes:
        path: its file.
        vocab_size: one more than the largest token id.
        eod: id of the token that ends a document.
    """

    path: Path
    vocab_size: int
    eod: int

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        ...

    def name(self, token: int) -> str:
        """How a token is called."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the tokenizer's file."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as a SentencePiece model",
                found=str(error),
                mend="give --tokenizer an intact .model, or none to train one",
            ) from error
        self.vocab_size: int = self._model.get_piece_size()
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            known = [self._model.piece_to_id(name) for name in _END_NAMES]
            known = [token for token in known if token != self._model.unk_id()]
            if not known:
                raise _no_end(path)
            self.eod = known[0]

    @cached_property
    def _blank_ids(self) -> list[int] | None:
        """Ids of the bytes of U+2581 if the model is of the exact kind, else None."""
        model = self._model
        ids = [model.piece_to_id(name) for name in _BLANK_BYTES]
        pieces = (model.id_to_piece(token) for token in range(self.vocab_size))
        exact = (
            model.unk_id() not in ids
            # A prefix before every text would come again where a text is cut.
            and "".join(model.encode("a", out_type=str)) == "a"
            and model.decode(model.encode(_PROBE)) == _PROBE
            and not any("\n" in piece and piece != "\n" for piece in pieces)
        )
        return ids if exact else None

    @property
    def exact(self) -> bool:
        """Whether it is of the kind that is trained here: every text comes back as it was."""
        return self._blank_ids is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        blank = self._blank_ids
        if blank is None:
            return list(self._model.encode(text))
        ids: list[int] = []
        for chunk in _chunks(text):
            for number, fragment in enumerate(chunk.split(_BLANK)):
                if number:
                    ids += blank
                ids += self._model.encode(fragment)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; the document end decodes to nothing."""
        return str(self._model.decode([int(token) for token in ids]))

    def name(self, token: int) -> str:
        """How a token is called."""
        return str(self._model.id_to_piece(token))

    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return sha256_file(self.path)


class HuggingFaceTokenizer:
    """A Hugging Face ``tokenizer.json``; needs the optional package ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{path}: the package that reads tokenizer.json is not installed",
                found="no module 'tokenizers'",
                mend="pip install 'megagrow[hf]'",
            ) from error
        self.path = path
        try:
            # The library raises bare Exception on every fault of the file.
            self._model: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise DataError(
                f"{path}: cannot be read as a Hugging Face tokenizer",
                found=str(error),
                mend="give --tokenizer an intact tokenizer.json",
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        # Text that spells a special token stays text.
        self._model.encode_special_tokens = True
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        ends = [vocabulary[name] for name in _END_NAMES if name in vocabulary]
        if not ends:
            raise _no_end(path)
        self.eod: int = ends[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens decode to nothing."""
        return str(self._model.decode([int(token) for token in ids], skip_special_tokens=True))

    def name(self, token: int) -> str:
        """How a token is called."""
        return str(self._model.id_to_token(token))

    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return sha256_file(self.path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a SentencePiece ``.model`` or a Hugging Face ``.json``.

    Raises:
        DataError: missing, damaged, of neither kind, or without a document end token.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file",
            mend="give the path of a SentencePiece .model or a Hugging Face tokenizer.json",
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
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
        # It reports a vocabulary that does not fit the corpus in this way only.
        raise DataError(
            f"training a tokenizer of {vocab_size} tokens failed",
            found=str(error),
            expected="a vocabulary above 258 (256 bytes and 2 special tokens) and the number of "
            "characters, and below what the corpus yields",
            mend="another --vocab-size, more text, or a ready --tokenizer",
        ) from error
    return content.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # Longer lines would be left out.
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _chunks(text: str) -> Iterator[str]:
    """Cut ``text`` at line ends into pieces of about a million characters."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        end = text.find("\n", start + _CHUNK_CHARACTERS)
        if end < 0:
            break
        yield text[start : end + 1]
        start = end + 1
    yield text[start:]


def _no_end(path: Path) -> DataError:
    return DataError(
        f"{path}: has no token that ends a document",
        expected=f"one of {', '.join(_END_NAMES)}",
        mend="add one of these special tokens to the tokenizer",
    )
