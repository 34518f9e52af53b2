"""The documents in a piece of a file: plain text, or the text of JSON records."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megagrow.data.formats import BOM, opened
from megagrow.data.tables import KINDS, texts
from megagrow.errors import DataError

_READ = 1 << 20  # characters
_NO_VALUE = re.compile(r"[ \t\r\n]*")
# Wrong lines are counted up to this many lines after the first.
_COUNTED = 100_000


@dataclass(frozen=True)
class TextPiece:
    """Bytes ``[begin, end)`` of a file, and how documents are stored in it.

    ``kind`` is ``file`` (one document), ``paragraph`` (documents are separated by blank lines),
    ``jsonl`` (an object per line), ``json`` (objects in any layout, or an array of them),
    ``parquet`` or ``arrow`` (a row each).  With a ``codec`` the piece is the whole file, and the
    bytes are those of the compressed file; a table is one piece, too.
    """

    path: Path
    begin: int
    end: int
    kind: str
    codec: str = ""


class _FaultError(Exception):
    """A record that does not match its file's format.

    Attributes:
        found, expected: see DataError.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.found, self.expected = found, expected


def read_documents(piece: TextPiece, *, text_key: str) -> Iterator[str | None]:
    """The documents of ``piece``; None for a whole file that cannot be read as UTF-8 text.

    Raises:
        DataError: a line or record does not match its file's format (the error names the file, the
            first wrong line, and the number of wrong lines), or compressed data is damaged.
    """
    if piece.kind in KINDS:
        yield from texts(piece.path, piece.kind, text_key)
        return
    with opened(piece.path, piece.codec) as stream:
        if piece.kind == "file":
            try:
                # As bytes: text mode would rewrite line ends.  A byte-order mark is not text.
                yield stream.read().removeprefix(BOM).decode("utf-8")
            except UnicodeDecodeError:
                yield None
        elif piece.kind == "jsonl":
            for line in _lines(piece, stream):
                try:
                    text = _line_text(line, text_key)
                except _FaultError:
                    raise _bad_lines(piece, text_key) from None
                if text is not None:
                    yield text
        elif piece.kind == "json":
            yield from _records(piece, stream, text_key)
        else:
            yield from _paragraphs(piece, stream)


def _paragraphs(piece: TextPiece, stream: BinaryIO) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _lines(piece, stream):
        if line.strip():
            try:
                paragraph.append(_decoded(line))
            except _FaultError:
                raise _bad_lines(piece, None) from None
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _lines(piece: TextPiece, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a piece, without a byte-order mark at the start of the file."""
    whole = bool(piece.codec)
    offset = 0 if whole else piece.begin
    if not whole:
        stream.seek(offset)
    while (whole or offset < piece.end) and (line := stream.readline()):
        yield line if offset else line.removeprefix(BOM)
        offset += len(line)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _FaultError(str(error), "UTF-8 text") from error


def _line_text(line: bytes, key: str) -> str | None:
    """The text of a JSON line; None if the line is blank."""
    if not line.strip():
        return None
    try:
        record = json.loads(_decoded(line))
    except (ValueError, RecursionError) as error:
        raise _FaultError(f"not JSON: {error}", _expected(key)) from error
    return _record_text(record, key)


def _record_text(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise _FaultError(f"a JSON {type(record).__name__}", _expected(key))
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise _FaultError(f"an object with the keys {keys}", _expected(key))
    text = record[key]
    if not isinstance(text, str):
        raise _FaultError(f"a {type(text).__name__} under {key!r}", _expected(key))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can encode half a surrogate pair, which is not a character.
        raise _FaultError(error.reason, "whole characters") from error
    return text


def _records(piece: TextPiece, stream: BinaryIO, key: str) -> Iterator[str]:
    """Texts of a series or an array of JSON objects; memory is bounded by the largest object."""
    decoder = json.JSONDecoder()
    reader = codecs.getreader("utf-8-sig")(stream)
    buffer, at, number, size, array, more = "", 0, 0, _READ, False, True

    def fault(error: _FaultError) -> DataError:
        where = f"{piece.path}, record {number + 1}"
        return _data_error(where, error.found, error.expected)

    while True:
        at = _NO_VALUE.match(buffer, at).end()  # type: ignore[union-attr]
        sign = buffer[at : at + 1]
        if sign == "[" and not array and not number:
            array, at = True, at + 1
            continue
        if sign == "]" and array:
            array, at = False, at + 1
            continue
        if sign == "," and array and number:
            at = _NO_VALUE.match(buffer, at + 1).end()  # type: ignore[union-attr]
        try:
            record, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            wrong = _FaultError(f"not JSON: {error}", _expected(key))
            if not _cut_off(error, buffer):
                raise fault(wrong) from error
            # The longer the record, the larger the reads.
            try:
                added = reader.read(size) if more else ""
            except UnicodeDecodeError as bad:
                raise fault(_FaultError(str(bad), "UTF-8 text")) from bad
            more, size = bool(added), size * 2
            buffer, at = buffer[at:] + added, 0
            if more:
                continue
            if buffer.strip():
                raise fault(wrong) from error
            break
        try:
            yield _record_text(record, key)
        except _FaultError as error:
            raise fault(error) from error
        number, size = number + 1, _READ
    if array:
        raise fault(_FaultError("the end of the file inside the array", "]"))


def _cut_off(error: Exception, buffer: str) -> bool:
    """Whether the JSON error may be due only to truncated input."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # Errors of truncated values and escapes point to their beginning, of strings to the string's.
    return error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")


def _bad_lines(piece: TextPiece, key: str | None) -> DataError:
    """The error for the first wrong line of a piece's file, with their number."""
    first, found, expected = 0, "", ""
    wrong = number = 0
    size = piece.path.stat().st_size
    whole = TextPiece(piece.path, 0, size, piece.kind, piece.codec)
    with opened(piece.path, piece.codec) as stream:
        for number, line in enumerate(_lines(whole, stream), start=1):
            try:
                _decoded(line) if key is None else _line_text(line, key)
            except _FaultError as error:
                wrong += 1
                if wrong == 1:
                    first, found, expected = number, error.found, error.expected
            if first and number >= first + _COUNTED:
                break
    if wrong > 1:
        found += f"; {wrong:,} of the first {number:,} lines are wrong"
    return _data_error(f"{piece.path}, line {first}", found, expected)


def _data_error(where: str, found: str, expected: str) -> DataError:
    return DataError(
        where,
        found=found,
        expected=expected,
        fix="correct or remove it; --text-key names the key of the text, and --format text "
        "takes files as they are",
    )


def _expected(key: str) -> str:
    return f"an object with a string under {key!r}"
