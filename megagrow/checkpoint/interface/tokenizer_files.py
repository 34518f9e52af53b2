"""A tokenizer that goes with a checkpoint: its files, and whether it is the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagrow.data.markers import NONE
from megagrow.data.tokenizer import Tokenizer, load_tokenizer

FILES = ("tokenizer.json", "tokenizer.model")  # that we read, in the order of preference

LIMIT = 256 << 20

# What a directory of Hugging Face may have beside or in place of them.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer that was found.

    Attributes:
        file: a tokenizer.json or SentencePiece .model; None if the place has only files of
            another kind, which we do not read.
        companions: files of Hugging Face that belong to it.
        sha256: of `file`.
        eod, bos: the tokens around the run's documents, where its dataset tells; a `bos` of None
            beside an `eod` is that there is none.
        said: where it is from and what it was compared with, for a person.
    """

    file: Path | None
    companions: tuple[Path, ...]
    sha256: str
    eod: int | None
    said: str
    bos: int | None = None

    def load(self) -> Tokenizer:
        """Open it, with the tokens around documents that the run had (DataError)."""
        assert self.file is not None
        bos = NONE if self.eod is not None and self.bos is None else self.bos
        return load_tokenizer(self.file, eod=self.eod, bos=bos)
