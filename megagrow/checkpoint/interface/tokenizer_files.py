"""The files of a tokenizer that goes with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagrow.data.markers import NONE
from megagrow.data.tokenizer import Tokenizer, load_tokenizer

FILES = ("tokenizer.json", "tokenizer.model")  # the kinds we read, in order of preference

LIMIT = 256 << 20

# Other tokenizer files that a Hugging Face directory may have.
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
        file: a tokenizer.json or SentencePiece .model; None if there are only files of a kind
            that we do not read.
        companions: Hugging Face files that belong to it.
        sha256: of `file`.
        eod, bos: the tokens around the run's documents, if its dataset says; an `eod` with a `bos`
            of None means that there is no `bos`.
        said: its origin and what it was compared with, for the user.
    """

    file: Path | None
    companions: tuple[Path, ...]
    sha256: str
    eod: int | None
    said: str
    bos: int | None = None

    def load(self) -> Tokenizer:
        """Load it, with the tokens that the run put around documents (DataError)."""
        assert self.file is not None
        bos = NONE if self.eod is not None and self.bos is None else self.bos
        return load_tokenizer(self.file, eod=self.eod, bos=bos)
