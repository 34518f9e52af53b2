r"""Token datasets in Megatron's ``.bin``/``.idx`` format.

``PREFIX.bin`` contains only the tokens of all sequences, concatenated. ``PREFIX.idx`` contains
their positions; everything in it is little-endian::

    9 bytes   b"MMIDIDX\0\0"
    uint64    version, 1
    uint8     code of the token type (DTYPE_CODES)
    uint64    S, the number of sequences
    uint64    D, the number of entries of the document table
    int32[S]  length of each sequence in tokens
    int64[S]  offset of each sequence in PREFIX.bin in bytes
    int64[D]  the document table: 0, then the sequence after each document's last

megagrow writes one sequence per document, so that D = S + 1. The layout is that of
``megatron/core/datasets/indexed_dataset.py`` in Megatron-LM, whose tools can read it; files of
Megatron-LM can be read if they do not use the multimodal extension.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megagrow.errors import DataError
from megagrow.files import sync_directory, temporary_name

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[str, int] = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in DTYPE_CODES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH = np.dtype("<i4")
_OFFSET = np.dtype("<i8")
_REMAKE = "make the dataset again with launch/prepare_data.py --overwrite"

Tokens = npt.NDArray[Any]


def dtype_for(vocab_size: int) -> str:
    """Megatron's token type for a vocabulary: ``uint16`` below 65,500, else ``int32``."""
    return "uint16" if vocab_size < 65_500 else "int32"


def bin_path(prefix: Path) -> Path:
    """The token file of dataset ``prefix``."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index file of dataset ``prefix``."""
    return prefix.with_name(prefix.name + ".idx")


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class IndexedDataset:
    """A memory-mapped, read-only ``.bin``/``.idx`` pair.

    Attributes:
        dtype: token type.
        lengths: int32 ``[sequences]``, in tokens.
        documents: int64 ``[document count + 1]``; document d is the sequences ``documents[d]`` up
            to, but not including, ``documents[d + 1]``.
        tokens: all tokens in order, ``[total tokens]``, unchecked: see :meth:`window`.

    Args:
        prefix: the path of both files without ``.bin`` and ``.idx``.
        vocabulary: one more than the largest id, if known.

    Raises:
        DataError: a file is missing, truncated, damaged or not of this format.
    """

    def __init__(self, prefix: str | Path, vocabulary: int | None = None) -> None:
        self.prefix = Path(prefix)
        self.vocabulary = vocabulary
        index = idx_path(self.prefix)
        try:
            raw = _map(index, np.dtype(np.uint8))
            self._read_index(index, raw)
            self._map_tokens(bin_path(self.prefix))
        except OSError as error:
            raise DataError(
                f"{error.filename or index}: cannot be read", found=error.strerror, fix=_REMAKE
            ) from error

    def _read_index(self, path: Path, raw: Tokens) -> None:
        def require(holds: bool, what: str, found: object, expected: object) -> None:
            if not holds:
                raise DataError(f"{path}: {what}", found=found, expected=expected, fix=_REMAKE)

        require(
            len(raw) >= _HEADER.size, "header cut off", f"{len(raw)} bytes", f">= {_HEADER.size}"
        )
        magic, version, code, sequences, entries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        require(magic == MAGIC, "not an index file: wrong first bytes", magic, MAGIC)
        require(version == VERSION, "unknown version", version, VERSION)
        require(code in _DTYPES, "unknown token type code", code, sorted(_DTYPES))
        size = _HEADER.size + sequences * (_LENGTH.itemsize + _OFFSET.itemsize) + entries * 8
        require(len(raw) == size, "wrong file size for its counts", len(raw), f"{size} bytes")

        self.dtype: np.dtype[Any] = _DTYPES[code]
        body = raw[_HEADER.size :]
        parts = np.split(body, [sequences * 4, sequences * 12])
        self.lengths: Tokens = parts[0].view(_LENGTH)
        self._offsets: Tokens = parts[1].view(_OFFSET)
        self.documents: Tokens = parts[2].view(_OFFSET)

        require(
            bool((self.lengths >= 0).all()), "negative sequence length", "a negative one", ">= 0"
        )
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self._total = int(ends[-1]) if sequences else 0
        expected = (ends - self.lengths) * self.dtype.itemsize
        wrong = np.flatnonzero(self._offsets != expected)
        if len(wrong):
            at = int(wrong[0])
            require(False, f"offset of sequence {at}", self._offsets[at], expected[at])
        good = (
            entries > 0
            and self.documents[0] == 0
            and self.documents[-1] == sequences
            and bool((np.diff(self.documents) >= 0).all())
        )
        require(
            good, "damaged document table", self.documents[:8], f"0, ..., {sequences}, ascending"
        )

    def _map_tokens(self, path: Path) -> None:
        size, expected = path.stat().st_size, self._total * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{path}: length differs from what {idx_path(self.prefix).name} says",
                found=f"{size} bytes",
                expected=f"{expected} bytes ({self._total} tokens of {self.dtype.name})",
                fix=_REMAKE,
            )
        self.tokens: Tokens = _map(path, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> Tokens:
        """The tokens of one sequence, ``[length]``, without a copy."""
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.prefix}")
        start = int(self._offsets[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sequence])]

    @property
    def total_tokens(self) -> int:
        """Number of tokens in all sequences."""
        return self._total

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def token_range(self, start: int, stop: int) -> Tokens:
        """The tokens ``[start, stop)`` of all sequences concatenated, without a copy."""
        if not 0 <= start <= stop <= self._total:
            raise IndexError(f"tokens [{start}, {stop}) of {self._total} in {self.prefix}")
        return self.tokens[start:stop]

    def window(self, start: int, length: int, what: str) -> npt.NDArray[np.int64]:
        """Tokens ``[start, start + length)``, ``[length]``, wrapping around at the end.

        Args:
            start: in ``[0, total tokens)``.
            length: at most the total.
            what: a description of the tokens, for the error.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        stop = start + length
        found = self.tokens[start:stop].astype(np.int64)
        if stop > self._total:
            head = self.tokens[: stop - self._total].astype(np.int64)
            found = np.concatenate([found, head])
        return self._checked(found, what, lambda number: (start + number) % self._total)

    def at(self, places: npt.NDArray[np.int64], what: str) -> npt.NDArray[np.int64]:
        """The tokens at ``places``, in the same shape; otherwise like :meth:`window`."""
        found = self.tokens[places].astype(np.int64)
        return self._checked(found, what, lambda number: int(places[number]))

    def _checked(
        self, found: npt.NDArray[np.int64], what: str, place: Callable[[int], int]
    ) -> npt.NDArray[np.int64]:
        if self.vocabulary is None:
            return found
        wrong = np.flatnonzero((found < 0) | (found >= self.vocabulary))
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"{bin_path(self.prefix)}: a token id that the vocabulary does not have, in {what}",
                found=f"{found[first]} at token {place(first)}; "
                f"{len(wrong)} such in {len(found)} tokens",
                expected=f"0 to {self.vocabulary - 1}",
                fix=_REMAKE,
            )
        return found


class IndexedWriter:
    """Writes a ``.bin``/``.idx`` pair document by document; use it as a context manager.

    Both files are written under temporary names.  When the block ends without an exception they are
    synced and renamed, the index last: an index never exists without its tokens. After an exception
    nothing is left.

    Attributes:
        bin_sha256: sha256 of the token file, set when the block has ended.
    """

    def __init__(self, prefix: str | Path, dtype: str) -> None:
        self.prefix = Path(prefix)
        self.dtype = _DTYPES[DTYPE_CODES[dtype]]
        self.bin_sha256 = ""
        self._code = DTYPE_CODES[dtype]
        self._lengths: list[Tokens] = []
        self._digest = hashlib.sha256()

    def __enter__(self) -> IndexedWriter:
        self._temporary = [temporary_name(p(self.prefix)) for p in (bin_path, idx_path)]
        self._stream: BinaryIO = open(self._temporary[0], "wb")
        return self

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document, ``[length]`` token ids.

        Raises:
            DataError: a token id does not fit the token type, or the document has
                2**31 tokens or more.
        """
        values = np.asarray(tokens)
        bounds = np.iinfo(self.dtype)
        if len(values) and not (bounds.min <= values.min() and values.max() <= bounds.max):
            raise DataError(
                f"{self.prefix}: token ids do not fit {self.dtype.name}",
                found=f"{values.min()} to {values.max()}",
                expected=f"{bounds.min} to {bounds.max}",
                fix="--dtype int32",
            )
        self.add_documents(values, np.array([len(values)]))

    def add_document_parts(self, parts: Iterable[Tokens]) -> int:
        """Append one document given in parts, ``[any length]`` ids each; returns its length.

        The ids must fit the token type.
        """
        length = 0
        for part in parts:
            self._write(part)
            length += len(part)
        self.add_documents(np.empty(0, self.dtype), np.array([length]))
        return length

    def add_documents(self, tokens: Tokens, lengths: Tokens) -> None:
        """Append many concatenated documents: ``[sum(lengths)]`` ids, ``[documents]`` lengths.

        The ids must fit the token type.
        """
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document is too long for the format",
                found=f"{lengths.max()} tokens",
                expected="below 2**31",
                fix="split the file into several documents",
            )
        self._write(tokens)
        self._lengths.append(np.asarray(lengths, dtype=_LENGTH))

    def _write(self, tokens: Tokens) -> None:
        content = np.ascontiguousarray(tokens, dtype=self.dtype).view(np.uint8).data
        self._stream.write(content)
        self._digest.update(content)

    def add_part(self, part: IndexedDataset, first: int, last: int) -> None:
        """Append sequences ``[first, last)`` of ``part``, each as one document.

        Raises:
            DataError: ``part`` has another token type.
        """
        if part.dtype != self.dtype:
            raise DataError(
                f"{part.prefix}: token type", found=part.dtype.name, expected=self.dtype.name
            )
        lengths = part.lengths[first:last]
        start = int(part.lengths[:first].sum(dtype=np.int64))
        stop = start + int(lengths.sum(dtype=np.int64))
        self.add_documents(part.token_range(start, stop), lengths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._stream:
                if kind is not None:
                    return
                self._stream.flush()
                os.fsync(self._stream.fileno())
            with open(self._temporary[1], "wb") as stream:
                self._write_index(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(self._temporary[0], bin_path(self.prefix))
            os.replace(self._temporary[1], idx_path(self.prefix))
            sync_directory(self.prefix.parent)
            self.bin_sha256 = self._digest.hexdigest()
        finally:
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.concatenate([np.empty(0, _LENGTH), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64)
        count = len(lengths)
        stream.write(_HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
        stream.write(lengths.astype(_LENGTH).tobytes())
        stream.write(((ends - lengths) * self.dtype.itemsize).astype(_OFFSET).tobytes())
        stream.write(np.arange(count + 1, dtype=_OFFSET).tobytes())
