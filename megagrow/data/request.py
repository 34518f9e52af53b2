"""What to prepare: a request, with all checks that are possible before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.data.files import sha256_file
from megagrow.data.formats import FORMATS
from megagrow.data.markers import Markers
from megagrow.errors import DataError

# NumPy and the tokenizers are imported on use: a command line needs only the defaults.

DTYPES = ("auto", "uint16", "int32")


@dataclass(frozen=True)
class Request:
    """What to prepare; see ``launch/prepare_data.py --help``."""

    input: str
    output: Path
    tokenizer: Path | None = None
    vocab_size: int = 4096
    tokenizer_sample: int = 8 << 20
    validation_fraction: float = 0.01
    seed: int = 1234
    dtype: str = "auto"
    glob: str = "*"
    format: str = "auto"
    text_key: str | None = None
    documents: str = "file"
    eod: str | None = None
    bos: str | None = None
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        def require(holds: bool, option: str, found: object, expected: str) -> None:
            if not holds:
                raise DataError(f"{option}: out of range", found=found, expected=expected)

        fraction = self.validation_fraction
        require(
            0 < fraction < 1,
            "--validation-fraction",
            fraction,
            "above 0, since every run validates, and below 1",
        )
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
        units = ("file", "paragraph")
        require(self.documents in units, "--documents", self.documents, " or ".join(units))
        require(self.format in FORMATS, "--format", self.format, " or ".join(FORMATS))
        require(self.tokenizer_sample >= 1, "--tokenizer-sample", self.tokenizer_sample, ">= 1")
        require(self.dtype in DTYPES, "--dtype", self.dtype, " or ".join(DTYPES))
        if self.format == "text" and self.text_key is not None:
            raise DataError(
                "--text-key: plain text has no keys",
                found="--format text",
                fix="leave out one of the two",
            )
        if self.tokenizer is not None:
            return
        from megagrow.data.tokenizer import require_vocabulary

        require_vocabulary(self.vocab_size)
        require_dtype(self.dtype, self.vocab_size)
        for option, value in (("--eod", self.eod), ("--bos", self.bos)):
            if value is not None:
                raise DataError(
                    f"{option}: only with --tokenizer",
                    found=value,
                    expected="a tokenizer that is trained here ends documents with its own token",
                    fix=f"leave {option} out, or give a --tokenizer",
                )

    @property
    def form(self) -> str:
        """The format of all files, or ``auto``; a given key implies JSON."""
        return "jsonl" if self.text_key is not None else self.format

    @property
    def key(self) -> str:
        """The key of the text in a JSON record."""
        return "text" if self.text_key is None else self.text_key

    def arguments(self, markers: Markers | None) -> dict[str, Any]:
        """Everything that the content of the dataset depends on, except the text.

        Args:
            markers: of the given tokenizer, if any.
        """
        return {
            "tokenizer_sha256": sha256_file(self.tokenizer) if self.tokenizer else None,
            "vocab_size": None if self.tokenizer else self.vocab_size,
            "tokenizer_sample": None if self.tokenizer else self.tokenizer_sample,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "dtype": self.dtype,
            "glob": self.glob,
            "format": self.form,
            "text_key": self.key,
            "documents": self.documents,
            "eod": markers.eod if markers else None,
            "bos": markers.bos if markers else None,
        }


@dataclass(frozen=True)
class Adoption:
    """What to make a dataset of; see ``launch/prepare_data.py --help``.

    Attributes:
        tokens: files, prefixes or directories of training tokens.
        output: the directory to make.
        tokenizer: the one that made the tokens.
        validation: as `tokens`; or None, and the last `validation_fraction` of them validates.
        dtype: of raw files.
        eod, bos: names of the tokens that end and begin a document, if the tokenizer's own are not.
    """

    tokens: Sequence[Path]
    output: Path
    tokenizer: Path
    validation: Sequence[Path] | None = None
    validation_fraction: float = 0.01
    dtype: str | None = None
    eod: str | None = None
    bos: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                "--validation-fraction: out of range",
                found=self.validation_fraction,
                expected="above 0, since every run validates, and below 1",
            )


def require_dtype(dtype: str, vocab_size: int) -> str:
    """The token type; raises DataError if it is too small for the vocabulary."""
    import numpy as np

    from megagrow.data.indexed import dtype_for

    chosen = dtype_for(vocab_size) if dtype == "auto" else dtype
    largest = np.iinfo(np.dtype(chosen)).max
    if vocab_size - 1 > largest:
        raise DataError(
            f"--dtype {chosen}: too small for the vocabulary",
            found=f"{vocab_size} tokens",
            expected=f"at most {largest + 1}",
            fix="--dtype int32",
        )
    return chosen
