"""Format detection of a corpus file: by content, and by name only if the name is unambiguous.

**Tables** (Parquet, Arrow) are recognised by their first bytes (`megagrow.data.tables`).

**Compression** is recognised by the first bytes, whatever the file's name.

**JSON or text.**  ``.jsonl`` and ``.ndjson`` hold one JSON object per line. Any other file is
inspected: if its first line is a JSON object, it is JSON lines; if it begins with an object of
several lines or an array of objects, it is a series of JSON records. If the records have a text
under the key, they are read as records. If not, the file may also be a document, such as a
``package.json`` among source files, and the caller must decide.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megagrow.data.tables import KINDS, require_text, table_kind
from megagrow.errors import DataError

FORMATS = ("auto", "text", "jsonl")
BOM = b"\xef\xbb\xbf"
WAYS = "give --format text (files are documents) or --format jsonl (JSON records)"
_CODECS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}
_SUFFIXES = {".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz"}
_CONTAINERS = {
    b"PK\x03\x04": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "an LZ4 file",
}
_HEAD = 1 << 20
_READ = 1 << 16
_LONGEST_LOOK = 64 << 20  # bytes of a record that are read for detection


@dataclass(frozen=True)
class Form:
    """How documents are stored in a file.

    Attributes:
        kind: ``text``, ``jsonl`` (an object per line), ``json`` (objects in any layout, or an
            array of them), ``parquet`` or ``arrow``.
        codec: ``gzip``, ``bzip2``, ``xz``, ``zstd``, or empty for a plain file.
    """

    kind: str
    codec: str = ""

    def __str__(self) -> str:
        names = {"text": "text", "jsonl": "JSON lines", "json": "JSON records", **KINDS}
        name = names[self.kind]
        return f"{name}, {self.codec}" if self.codec else name


def form_of(path: Path, *, wanted: str, key: str) -> Form:
    """Detect the format of a file.

    Args:
        path: the file.
        wanted: ``auto``, or the format of all files: ``text`` or ``jsonl``.
        key: the key of the text in a JSON record.

    Raises:
        DataError: not a regular file, an unsupported archive or table, damaged compressed data, a
            file that does not match ``wanted``, or an ambiguous one.
    """
    if _type_of(path) != "a file":
        raise DataError(
            f"{path}: is not a regular file",
            found=_type_of(path),
            expected="a file: it is read twice, and by several processes",
            fix="write its content to a file and give that, or move it away",
        )
    with open(path, "rb") as stream:
        start = stream.read(512)
    codec = next((name for magic, name in _CODECS.items() if start.startswith(magic)), "")
    with opened(path, codec) as content:
        head = content.read(_HEAD)
        _refuse_containers(path, head)
        table = table_kind(head)
        if table is not None:
            _refuse_as_text(path, KINDS[table], codec, wanted)
            require_text(path, table, key)
            return Form(table)
        names = [s.lower() for s in path.suffixes if s.lower() not in _SUFFIXES]
        if wanted == "text":
            return Form("text", codec)
        if wanted == "auto" and names[-1:] in ([".jsonl"], [".ndjson"]):
            return Form("jsonl", codec)
        kind, record = _json_kind(head, content)
    if wanted == "jsonl":
        if kind is None and head.strip():
            raise DataError(
                f"{path}: is not JSON",
                found=repr(head[:60].decode("utf-8", "replace")),
                expected=f"JSON records with the text under {key!r}",
                fix="move the file away; or, for documents of plain text, "
                "--format text without --text-key",
            )
        return Form(kind or "jsonl", codec)
    if kind is None:
        return Form("text", codec)
    if not isinstance(record.get(key), str):
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(
            f"{path}: JSON, but without a text under {key!r}: it could be records with another "
            "key, or itself a document",
            found=f"an object with the keys {keys}",
            expected=f"a string under {key!r}",
            fix=f"--text-key names the key; else {WAYS}, or move the file away",
        )
    return Form(kind, codec)


@contextmanager
def opened(path: Path, codec: str) -> Iterator[BinaryIO]:
    """A file's content, decompressed as it is read.

    Raises:
        DataError: the compressed data is damaged or cut off, or zstd's package is missing.
    """
    try:
        with _open(path, codec) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise _damaged(path, codec, error) from error
    except OSError as error:
        if codec != "bzip2" or error.errno is not None:
            raise
        raise _damaged(path, codec, error) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(path, codec, error) from error


def _open(path: Path, codec: str) -> BinaryIO:
    if codec == "gzip":
        return io.BufferedReader(gzip.open(path, "rb"))
    if codec == "bzip2":
        return io.BufferedReader(bz2.open(path, "rb"))
    if codec == "xz":
        return io.BufferedReader(lzma.open(path, "rb"))
    if codec == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path}: the package for reading zstd is not installed",
                found="no module 'zstandard'",
                fix="pip install 'megagrow[zstd]', or decompress the file (zstd -d)",
            ) from error
        return io.BufferedReader(_Zstd(open(path, "rb"), zstandard), _HEAD)
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """The content of a zstd file; the package's own reader does not detect truncation."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file = file
        self._frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._now: Any = None  # the current frame
        self._left = b""  # compressed bytes read but not yet used
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._left or self._file.read(_READ)
            self._left = b""
            if not content:
                if self._now is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._now = self._now or self._frame()
            self._ready = self._now.decompress(content)
            if self._now.eof:
                self._left, self._now = self._now.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _damaged(path: Path, codec: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: its {codec} data is damaged or cut off",
        found=str(error),
        fix="get the file again, or move it away",
    )


def _refuse_containers(path: Path, head: bytes) -> None:
    what = next((name for magic, name in _CONTAINERS.items() if head.startswith(magic)), None)
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive"
    if what is not None:
        raise DataError(
            f"{path}: {what}, which is not supported",
            expected="text, JSON lines or JSON records, plain or compressed by gzip, bzip2, xz or "
            "zstd; Parquet or Arrow",
            fix="unpack or convert it, or move it away",
        )


def _refuse_as_text(path: Path, name: str, codec: str, wanted: str) -> None:
    if codec or wanted == "text":
        raise DataError(
            f"{path}: {name}, {f'compressed by {codec}' if codec else 'which is not text'}",
            fix="decompress it: such a file is compressed inside" if codec
            else "leave out --format text, or move it away",
        )  # fmt: skip


def _json_kind(head: bytes, rest: BinaryIO) -> tuple[str | None, dict[str, Any]]:
    """``jsonl`` or ``json`` with the first record; None if it is not JSON records."""
    start = head.removeprefix(BOM).lstrip()
    if not start.startswith((b"{", b"[")):
        return None, {}
    line, found, _ = start.partition(b"\n")
    if not found:
        line += rest.readline(_LONGEST_LOOK)
    first = _parsed(line)
    if isinstance(first, dict):
        return "jsonl", first
    whole = start + rest.read(_LONGEST_LOOK) if found else line + rest.read(_LONGEST_LOOK)
    text = whole.decode("utf-8", "ignore")
    decoder = json.JSONDecoder()
    try:
        if text.startswith("["):
            inside = text[1:].lstrip()
            # An array of records, or one without records: [], [1, 2]. `[1] A. Author` is text.
            record, end = decoder.raw_decode(inside) if inside.startswith("{") else ({}, 0)
            is_array = end > 0 or isinstance(_parsed(whole), list)
            return ("json", record) if is_array else (None, {})
        record, end = decoder.raw_decode(text)
        follows = text[end:].lstrip()
        return ("json", record) if not follows or follows.startswith("{") else (None, {})
    except (ValueError, RecursionError):
        return None, {}


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _type_of(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing"
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for holds, name in kinds if holds(mode)), "a device or another kind of file")
