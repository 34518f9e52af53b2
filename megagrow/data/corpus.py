"""Sources of documents: text files, records, tables, directories, Python's standard library.

A corpus is a sorted list of files, split into pieces (a file, or a byte range that begins and ends
between documents) and packed into shards of about equal size. Neither depends on the number of
workers. A compressed file and a table are one piece.
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

from megagrow.data.documents import TextPiece
from megagrow.data.formats import Form, form_of
from megagrow.data.tables import KINDS, saved_dataset
from megagrow.errors import DataError

STDLIB = "stdlib"
_SHARD_BYTES = 1 << 20
_MAX_SHARDS = 1024
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
_EXAMPLES = 20  # example names kept per group of files


@dataclass
class FileGroup:
    """A group of files in a report: their number, and the first names relative to the input."""

    files: int
    names: list[str]

    def add(self, name: str) -> None:
        """Add a file."""
        self.files += 1
        if len(self.names) < _EXAMPLES:
            self.names.append(name)


@dataclass(frozen=True)
class Corpus:
    """The documents to prepare.

    Attributes:
        files: number of files.
        size: bytes of all files.
        fingerprint: sha256 over names, sizes and modification times.
        pieces: in the order of the documents.
        shards: the same, packed.
        formats: the detected formats of the files.
        left_out: files and directories that were skipped, by reason.
    """

    files: int
    size: int
    fingerprint: str
    pieces: tuple[TextPiece, ...]
    shards: tuple[tuple[TextPiece, ...], ...]
    formats: dict[str, FileGroup]
    left_out: dict[str, FileGroup]


def open_corpus(
    source: str,
    *,
    glob: str,
    split: str,
    exclude: tuple[Path, ...] = (),
    form: str = "auto",
    text_key: str = "text",
) -> Corpus:
    """Find the files of ``source`` and divide them into shards.

    Args:
        source: a file, a directory, or ``stdlib``.
        glob: the files of a directory to use, matched on the name or the relative path; names that
            begin with a dot are skipped.
        split: ``file`` or ``paragraph``: the unit of a document in a text file.
        exclude: directories to skip.
        form: ``auto``, or the format of all files: ``text`` or ``jsonl``.
        text_key: the key of the text in a JSON record.

    Raises:
        DataError: the source does not exist or is empty, or a file cannot be read or is ambiguous.
    """
    paths: list[Path] | None
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
    left_out: dict[str, FileGroup] = {}
    if source == STDLIB:
        if form == "jsonl":
            raise DataError(
                f"--input {STDLIB}: is source files, not JSON",
                fix="leave out --text-key and --format",
            )
        # Other files there are not the library's text, and its sources are not records.
        paths, form = _walk(root, "*.py", exclude, _FOREIGN, {}), "text"
    elif root.is_dir():
        # With a --glob the caller chooses among the files.
        paths = saved_dataset(root) if glob == "*" else None
        if paths is None:
            paths = _walk(root, glob, exclude, set(), left_out)
        else:
            beside = [path for path in sorted(root.iterdir()) if path not in paths]
            left_out["files beside the tables of a saved dataset"] = FileGroup(
                len(beside), [path.name for path in beside[:_EXAMPLES]]
            )
    elif os.path.lexists(root):
        paths = [root]
    else:
        raise DataError(
            f"--input {source}: no such file or directory",
            expected=f"text, JSON records, a table, a directory, or the word {STDLIB}",
        )
    if not paths:
        raise DataError(
            f"--input {source}: no files in {root}",
            found="; ".join(f"{group.files} {why}" for why, group in left_out.items()) or None,
            expected=f"files like {glob!r}",
        )

    digest = hashlib.sha256()
    sizes = []
    forms: list[Form] = []
    formats: dict[str, FileGroup] = {}
    for path in paths:
        forms.append(form_of(path, wanted=form, key=text_key))
        status = path.stat()
        sizes.append(status.st_size)
        name = path.relative_to(root).as_posix() if path != root else path.name
        formats.setdefault(str(forms[-1]), FileGroup(0, [])).add(name)
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    total = sum(sizes)
    target = max(_SHARD_BYTES, total // _MAX_SHARDS)
    pieces = tuple(
        piece
        for path, size, found in zip(paths, sizes, forms, strict=True)
        for piece in _cut(path, size=size, form=found, split=split, target=target)
    )
    shards = tuple(_pack(pieces, target))
    return Corpus(len(paths), total, digest.hexdigest(), pieces, shards, formats, left_out)


def _walk(
    root: Path,
    glob: str,
    exclude: tuple[Path, ...],
    names: set[str],
    left_out: dict[str, FileGroup],
) -> list[Path]:
    """The files below ``root`` in order; records skipped ones in ``left_out``."""
    found = []
    own = {path.resolve() for path in exclude}

    def leave_out(path: Path, why: str) -> None:
        left_out.setdefault(why, FileGroup(0, [])).add(path.relative_to(root).as_posix())

    for folder, folders, files in os.walk(root):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            if name.startswith("."):
                leave_out(here / name / "", "hidden directories")
            elif name not in names and (here / name).resolve() not in own:
                kept.append(name)
                if (here / name).is_symlink():
                    leave_out(here / name, "links to directories")
        folders[:] = kept
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if name.startswith("."):
                leave_out(path, "hidden files")
            elif not (fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(relative, glob)):
                leave_out(path, f"not like --glob {glob}")
            else:
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _cut(path: Path, *, size: int, form: Form, split: str, target: int) -> Iterator[TextPiece]:
    kind = split if form.kind == "text" else form.kind
    if kind in ("file", "json", *KINDS) or form.codec:
        yield TextPiece(path, 0, size, kind, form.codec)
        return
    begin = 0
    with open(path, "rb") as stream:
        while begin < size:
            stream.seek(begin + target)
            end = min(size, _next_border(stream, kind))
            yield TextPiece(path, begin, end, kind)
            begin = end


def _next_border(stream: BinaryIO, kind: str) -> int:
    """The next position at which a document may begin."""
    # The seek may have landed inside a line.
    line = stream.readline()
    while line and kind == "paragraph":
        line = stream.readline()
        if not line.strip():
            break
    return stream.tell() if line else os.fstat(stream.fileno()).st_size


def _pack(pieces: tuple[TextPiece, ...], target: int) -> Iterator[tuple[TextPiece, ...]]:
    shard: list[TextPiece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += piece.end - piece.begin
        if size >= target:
            yield tuple(shard)
            shard, size = [], 0
    if shard:
        yield tuple(shard)
