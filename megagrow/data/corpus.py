"""Where documents come from: text files, directories, JSONL, Python's own library.

A corpus is a sorted list of files, cut into pieces (a file, or a byte range of one
that begins and ends between documents) and packed into shards of about equal size.
Neither depends on how many workers there will be.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megagrow.errors import DataError

STDLIB = "stdlib"
_SHARD_BYTES = 1 << 20
_MAX_SHARDS = 1024
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Piece:
    """Bytes ``[begin, end)`` of a file, and how documents lie in it.

    ``kind`` is ``file`` (all of it is one document), ``paragraph`` (documents are
    parted by blank lines) or ``jsonl`` (one a line).
    """

    path: Path
    begin: int
    end: int
    kind: str


@dataclass(frozen=True)
class Corpus:
    """The documents to prepare.

    Attributes:
        files: number of files.
        size: bytes of all files.
        fingerprint: sha256 over names, sizes and times of change.
        pieces: in the order of the documents.
        shards: the same, packed.
    """

    files: int
    size: int
    fingerprint: str
    pieces: tuple[Piece, ...]
    shards: tuple[tuple[Piece, ...], ...]


def open_corpus(source: str, *, glob: str, split: str, exclude: tuple[Path, ...] = ()) -> Corpus:
    """Find the files of ``source`` and cut them into shards.

    Args:
        source: a file, a directory, or ``stdlib``.
        glob: which files of a directory, matched on the name or the relative path;
            names that begin with a dot are left out.
        split: ``file`` or ``paragraph``: how documents lie in a text file.
        exclude: directories to leave out.

    Raises:
        DataError: no such source, or no file in it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
    if source == STDLIB:
        paths = _walk(root, "*.py", exclude, _FOREIGN)
    elif root.is_dir():
        paths = _walk(root, glob, exclude, set())
    elif root.exists():
        paths = [root]
    else:
        raise DataError(
            f"--input {source}: no such file or directory",
            expected=f"a text file, a .jsonl file, a directory, or the word {STDLIB}",
        )
    if not paths:
        raise DataError(f"--input {source}: no files in {root}", expected=f"files like {glob!r}")

    digest = hashlib.sha256()
    sizes = []
    for path in paths:
        status = path.stat()
        sizes.append(status.st_size)
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    total = sum(sizes)
    target = max(_SHARD_BYTES, total // _MAX_SHARDS)
    pieces = tuple(
        piece
        for path, size in zip(paths, sizes, strict=True)
        for piece in _cut(path, size=size, split=split, target=target)
    )
    return Corpus(len(paths), total, digest.hexdigest(), pieces, tuple(_pack(pieces, target)))


def _walk(root: Path, glob: str, exclude: tuple[Path, ...], names: set[str]) -> list[Path]:
    found = []
    left_out = {path.resolve() for path in exclude}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in names
            and (here / name).resolve() not in left_out
        ]
        for name in files:
            path = here / name
            relative = path.relative_to(root).as_posix()
            wanted = fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(relative, glob)
            if wanted and not name.startswith(".") and path.is_file():
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _cut(path: Path, *, size: int, split: str, target: int) -> Iterator[Piece]:
    kind = "jsonl" if path.suffix in (".jsonl", ".ndjson") else split
    if kind == "file":
        yield Piece(path, 0, size, kind)
        return
    begin = 0
    with open(path, "rb") as stream:
        while begin < size:
            stream.seek(begin + target)
            end = min(size, _next_border(stream, kind))
            yield Piece(path, begin, end, kind)
            begin = end


def _next_border(stream: BinaryIO, kind: str) -> int:
    """Position of the next place where a document may begin."""
    # The seek may have landed within a line.
    line = stream.readline()
    while line and kind == "paragraph":
        line = stream.readline()
        if not line.strip():
            break
    return stream.tell() if line else os.fstat(stream.fileno()).st_size


def _pack(pieces: tuple[Piece, ...], target: int) -> Iterator[tuple[Piece, ...]]:
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += piece.end - piece.begin
        if size >= target:
            yield tuple(shard)
            shard, size = [], 0
    if shard:
        yield tuple(shard)


def read_documents(piece: Piece, *, text_key: str) -> Iterator[str | None]:
    """The documents of ``piece``; None for a whole file that cannot be read as UTF-8 text.

    Raises:
        DataError: a line is not what its file promises; file and line are named.
    """
    if piece.kind == "file":
        try:
            # As bytes: text mode would rewrite line ends.
            yield piece.path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, PermissionError):
            yield None
    elif piece.kind == "jsonl":
        for offset, line in _lines(piece):
            if line.strip():
                yield _json_text(piece.path, offset, line, text_key)
    else:
        paragraph: list[str] = []
        for offset, line in _lines(piece):
            if line.strip():
                paragraph.append(_decode(piece.path, offset, line))
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines of a piece with the offset of each in the file."""
    with open(piece.path, "rb") as stream:
        stream.seek(piece.begin)
        offset = piece.begin
        while offset < piece.end and (line := stream.readline()):
            yield offset, line
            offset += len(line)


def _decode(path: Path, offset: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_line(path, offset, str(error), "UTF-8 text") from error


def _json_text(path: Path, offset: int, line: bytes, key: str) -> str:
    expected = f"an object with a string under {key!r}"
    try:
        record = json.loads(_decode(path, offset, line))
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, offset, f"not JSON: {error}", expected) from error
    if not isinstance(record, dict):
        raise _bad_line(path, offset, f"a JSON {type(record).__name__}", expected)
    if key not in record:
        found = f"an object with the keys {', '.join(map(repr, list(record)[:8])) or 'none'}"
        raise _bad_line(path, offset, found, expected)
    text = record[key]
    if not isinstance(text, str):
        raise _bad_line(path, offset, f"a {type(text).__name__} under {key!r}", expected)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which is no character.
        raise _bad_line(path, offset, f"{error.reason}", "whole characters") from error
    return text


def _bad_line(path: Path, offset: int, found: str, expected: str) -> DataError:
    # Counted only now, so that shards need not know the lines before them.
    with open(path, "rb") as stream:
        number, left = 1, offset
        while left and (chunk := stream.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return DataError(
        f"{path}, line {number}",
        found=found,
        expected=expected,
        mend="mend or remove the line; --text-key names the key of the text",
    )
