"""Token files that others made, read where they are: Megatron-LM's, nanoGPT's, llm.c's, NumPy's.

====================  ==========================================================================
Megatron-LM           ``PREFIX.bin`` with ``PREFIX.idx`` (`megagrow.data.indexed`)
llm.c                 ``*.bin``: 256 int32, of which the first three are a magic number, a version
                      and the number of tokens; uint16 (20240520) or uint32 (20240801)
NumPy                 ``*.npy``: one axis of integers
raw, as nanoGPT's     any other ``*.bin``: uint16, or what is given
====================  ==========================================================================

A dataset of such files is several ranges of tokens, of one or more files, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagrow.data.indexed import IndexedDataset, bin_path, idx_path
from megagrow.errors import DataError

Int64 = npt.NDArray[np.int64]
_MAGIC = {20240520: "<u2", 20240801: "<u4"}
_HEADER_BYTES = 256 * 4
_CHUNK = 1 << 22  # tokens


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, and where they begin in it.

    Attributes:
        path: of the tokens.
        kind: megatron, llm.c, npy or raw.
        dtype: of a token, as NumPy writes it.
        offset: of the first token, in bytes.
        tokens: their number.
    """

    path: str
    kind: str
    dtype: str
    offset: int
    tokens: int

    def map(self) -> npt.NDArray[Any]:
        """The tokens, memory-mapped.

        Raises:
            DataError: the file is gone, or shorter than it was.
        """
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: cannot be read",
                found=getattr(error, "strerror", None) or str(error),
                expected=f"the {self.tokens:,} tokens that were there when the dataset was made",
                fix="put the file back, or make the dataset again from where the tokens are now "
                "(--tokens, --overwrite)",
            ) from error


@dataclass(frozen=True)
class Range:
    """The tokens [start, stop) of a file."""

    file: TokenFile
    start: int
    stop: int

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; `from_json` is its inverse."""
        return {**asdict(self.file), "start": self.start, "stop": self.stop}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Range:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        file = {name: data[name] for name in ("path", "kind", "dtype", "offset", "tokens")}
        found = Range(TokenFile(**file), int(data["start"]), int(data["stop"]))
        if not 0 <= found.start <= found.stop <= found.file.tokens:
            raise ValueError(f"range {found}")
        return found


class TokenRanges:
    """The tokens of several ranges, concatenated; `IndexedDataset` without documents.

    Args:
        ranges: in order.
        vocabulary: one more than the largest id, if known.

    Raises:
        DataError: a file is gone, or shorter than it was.
    """

    def __init__(self, ranges: Sequence[Range], vocabulary: int | None = None) -> None:
        self.ranges, self.vocabulary = tuple(ranges), vocabulary
        self._parts = [r.file.map()[r.start : r.stop] for r in ranges]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])])
        self.prefix = Path(ranges[0].file.path) if ranges else Path()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Token type."""
        return np.dtype(self.ranges[0].file.dtype)

    @property
    def total_tokens(self) -> int:
        """Number of tokens in all ranges."""
        return int(self._starts[-1])

    def window(self, start: int, length: int, what: str) -> Int64:
        """Tokens ``[start, start + length)``, ``[length]``, wrapping around at the end.

        Args:
            start: in ``[0, total tokens)``.
            length: at most the total.
            what: a description of the tokens, for the error.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        found, at = [], start
        while length:
            number = int(np.searchsorted(self._starts, at, side="right")) - 1
            inside = at - int(self._starts[number])
            part = self._parts[number][inside : inside + length].astype(np.int64)
            found.append(part)
            length -= len(part)
            at = (at + len(part)) % self.total_tokens
        total = self.total_tokens
        return self._checked(np.concatenate(found), what, lambda number: (start + number) % total)

    def at(self, places: Int64, what: str) -> Int64:
        """The tokens at ``places``, in the same shape; otherwise like :meth:`window`."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        found = np.empty(places.shape, np.int64)
        for number in np.unique(numbers):
            mine = numbers == number
            found[mine] = self._parts[number][places[mine] - self._starts[number]]
        return self._checked(found, what, lambda number: int(places[number]))

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """All tokens in order, in pieces."""
        for part in self._parts:
            for start in range(0, len(part), _CHUNK):
                yield part[start : start + _CHUNK]

    def sha256(self) -> str:
        """sha256 of the tokens as they are stored."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(as_bytes(chunk))
        return digest.hexdigest()

    def _checked(self, found: Int64, what: str, place: Callable[[int], int]) -> Int64:
        if self.vocabulary is not None:
            wrong = np.flatnonzero((found < 0) | (found >= self.vocabulary))
            if len(wrong):
                first = int(wrong[0])
                raise outside(self.where(place(first)), int(found[first]), self.vocabulary, what)
        return found

    def where(self, place: int) -> str:
        """The file and token of a place, as text."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        inside = place - int(self._starts[number]) + self.ranges[number].start
        return f"{self.ranges[number].file.path}, token {inside:,}"


def as_bytes(tokens: npt.NDArray[Any]) -> memoryview:
    """Tokens as they are stored."""
    return np.ascontiguousarray(tokens).view(np.uint8).data


def outside(where: str, value: int, vocabulary: int, what: str) -> DataError:
    """The error for an id that the vocabulary does not have."""
    return DataError(
        f"{where}: an id that the vocabulary does not have, in {what}",
        found=value,
        expected=f"0 to {vocabulary - 1}",
        fix="give the tokenizer that the tokens were made with, or --dtype if the file's type was "
        "taken for another",
    )


def find_files(paths: Sequence[Path], *, dtype: str | None) -> list[TokenFile]:
    """The token files that paths name: files, prefixes of Megatron-LM's, or directories of these.

    Args:
        paths: in order; a directory's files follow by name.
        dtype: of a token in raw files; uint16 if None.

    Raises:
        DataError: there is none, or one is of no known kind or damaged.
    """
    found: list[TokenFile] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in (".bin", ".npy"))
            strangers = [p.name for p in path.iterdir() if p.suffix not in (".bin", ".npy", ".idx")]
            if not inside or strangers:
                raise DataError(
                    f"--tokens {path}: not a directory of token files alone",
                    found=", ".join(sorted(strangers)[:4]) or "an empty directory",
                    expected="*.bin (with *.idx, where Megatron-LM made them) or *.npy",
                    fix="name the files",
                )
            found += [_open(file, dtype) for file in inside]
        elif path.suffix not in (".bin", ".npy", ".idx") and bin_path(path).exists():
            found.append(_open(bin_path(path), dtype))
        else:
            found.append(_open(path.with_suffix(".bin") if path.suffix == ".idx" else path, dtype))
    types = sorted({file.dtype for file in found})
    if len(types) > 1:
        raise DataError(
            "--tokens: files of different token types",
            found=", ".join(f"{f.path} {np.dtype(f.dtype).name}" for f in found[:6]),
            expected="one type",
            fix="make a dataset of each, and mix them (data.sources)",
        )
    return found


def document_lengths(file: TokenFile) -> Int64:
    """The lengths of the documents that Megatron-LM's index lists, ``[documents]`` tokens."""
    data = IndexedDataset(Path(file.path).with_suffix(""))
    ends = np.concatenate([[0], np.cumsum(data.lengths, dtype=np.int64)])[data.documents]
    return np.diff(ends)


def _open(path: Path, dtype: str | None) -> TokenFile:
    where = str(path.absolute())
    try:
        size = path.stat().st_size
        if path.suffix == ".npy":
            return _npy(path, where, dtype)
        if path.suffix == ".bin" and idx_path(path.with_suffix("")).exists():
            data = IndexedDataset(path.with_suffix(""))
            _same_type(where, data.dtype, dtype)
            return TokenFile(where, "megatron", data.dtype.str, 0, data.total_tokens)
        header = np.fromfile(path, "<i4", 3) if size >= _HEADER_BYTES else np.zeros(3, "<i4")
    except OSError as error:
        raise DataError(f"--tokens {path}: cannot be read", found=error.strerror) from error
    if int(header[0]) in _MAGIC:
        kind = np.dtype(_MAGIC[int(header[0])])
        _same_type(where, kind, dtype)
        tokens = int(header[2])
        if size != _HEADER_BYTES + tokens * kind.itemsize:
            raise DataError(
                f"--tokens {path}: length differs from what its header says",
                found=f"{size} bytes",
                expected=f"{_HEADER_BYTES + tokens * kind.itemsize} bytes ({tokens} tokens)",
            )
        return TokenFile(where, "llm.c", kind.str, _HEADER_BYTES, tokens)
    if path.suffix != ".bin":
        raise DataError(
            f"--tokens {path}: no kind of token file that is known",
            expected="*.bin (Megatron-LM's with *.idx, llm.c's, or raw) or *.npy",
            fix="text is prepared with --input",
        )
    kind = np.dtype(dtype or "uint16").newbyteorder("<")  # nanoGPT's
    if size == 0 or size % kind.itemsize:
        raise DataError(
            f"--tokens {path}: not a whole number of tokens",
            found=f"{size} bytes",
            expected=f"a multiple of {kind.itemsize} ({kind.name})",
            fix="--dtype of the tokens in it",
        )
    return TokenFile(where, "raw", kind.str, 0, size // kind.itemsize)


def _npy(path: Path, where: str, dtype: str | None) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"--tokens {path}: not a NumPy array", found=str(error)) from error
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.flags.c_contiguous:
        raise DataError(
            f"--tokens {path}: not a list of tokens",
            found=f"{array.dtype} of shape {list(array.shape)}",
            expected="integers along one axis",
        )
    _same_type(where, array.dtype, dtype)
    assert isinstance(array, np.memmap)
    return TokenFile(where, "npy", array.dtype.str, int(array.offset), len(array))


def _same_type(where: str, found: np.dtype[Any], asked: str | None) -> None:
    if asked is not None and np.dtype(asked) != found.newbyteorder("="):
        raise DataError(
            f"--dtype {asked}: the file says what its tokens are",
            found=f"{found.name} in {where}",
            fix="leave --dtype out: it is for raw files",
        )
