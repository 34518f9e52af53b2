"""Tables of records: Parquet and Arrow files, and datasets that Hugging Face's library saved.

A file is recognised by its content. One column has the text; a row is a document. The package
pyarrow reads them, some rows at a time, so memory does not grow with a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from megagrow.errors import DataError

KINDS = {"parquet": "Parquet", "arrow": "Arrow"}
STATE, SPLITS = "state.json", "dataset_dict.json"  # of `Dataset.save_to_disk`, of a `DatasetDict`
_STREAM = b"\xff\xff\xff\xff"  # begins a message of Arrow's streaming format
_LONGEST_SCHEMA = 1 << 26  # bytes: what a message's length may plausibly be
_ROWS = 1024  # read at a time


def table_kind(head: bytes) -> str | None:
    """The kind of table that a file's first bytes begin, a key of `KINDS`; None for other files."""
    if head.startswith(b"PAR1"):
        return "parquet"
    length = int.from_bytes(head[4:8], "little")
    streams = head.startswith(_STREAM) and 0 < length < _LONGEST_SCHEMA and length % 8 == 0
    return "arrow" if streams or head.startswith(b"ARROW1") else None


def require_text(path: Path, kind: str, key: str) -> None:
    """Check that a table has text in a column.

    Raises:
        DataError: it is damaged, has no such column, or one of another type; or pyarrow is missing.
    """
    with _batches(path, kind, None) as (schema, _):
        names = schema.names
        if names.count(key) != 1:
            shown = ", ".join(map(repr, names[:8])) or "none"
            raise DataError(
                f"{path}: a table without the column {key!r}" if key not in names
                else f"{path}: a table with several columns {key!r}",
                found=f"the columns {shown}",
                expected=f"one column of text called {key!r}",
                fix="name the column of the text with --text-key, or move the file away",
            )  # fmt: skip
        if not _is_text(schema.field(key).type):
            raise DataError(
                f"{path}: the column {key!r} is not text",
                found=f"{schema.field(key).type}",
                expected="strings",
                fix="name the column of the text with --text-key, or move the file away",
            )


def texts(path: Path, kind: str, key: str) -> Iterator[str]:
    """The text of each row.

    Raises:
        DataError: a row has no text, or the file is damaged.
    """
    row = 0
    with _batches(path, kind, key) as (_, batches):
        for batch in batches:
            for text in batch.column(batch.schema.names.index(key)).to_pylist():
                if text is None:
                    raise DataError(
                        f"{path}, row {row + 1}",
                        found=f"no value under {key!r}",
                        expected="text",
                        fix="remove such rows, or give them an empty text",
                    )
                row += 1
                yield text


def saved_dataset(root: Path) -> list[Path] | None:
    """The tables of a directory that `Dataset.save_to_disk` wrote; None for other directories.

    Raises:
        DataError: it has several splits, rows that are only selected, or is damaged.
    """
    if (root / SPLITS).is_file():
        splits = _read(root / SPLITS).get("splits")
        names = ", ".join(map(str, splits)) if isinstance(splits, list) else "unknown"
        raise DataError(
            f"{root}: a Hugging Face dataset of several splits",
            found=names,
            expected="one split: the validation set is made by --validation-fraction",
            fix=f"give the directory of one, such as --input {root}/train",
        )
    if not (root / STATE).is_file() or not (root / "dataset_info.json").is_file():
        return None
    state = _read(root / STATE)
    files = state.get("_data_files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{root}: a Hugging Face dataset whose rows are a selection from its files",
            fix="save it again after `dataset.flatten_indices()`",
        )
    try:
        paths = [root / str(file["filename"]) for file in files]  # type: ignore[union-attr]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{root / STATE}: does not list the dataset's files",
            found=repr(files)[:60],
            fix="save the dataset again",
        ) from error
    missing = [path.name for path in paths if path.parent != root or not path.is_file()]
    if missing:
        raise DataError(
            f"{root}: files of the dataset are missing: {', '.join(missing[:4])}",
            fix="copy or save the dataset again",
        )
    return paths


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read", found=error, fix="save it again") from error
    return content if isinstance(content, dict) else {}


@contextmanager
def _batches(path: Path, kind: str, key: str | None) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema of a table, and its rows in batches; of the column `key` alone if given."""
    arrow = _arrow(path)
    try:
        if kind == "parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as table:
                columns = None if key is None else [key]
                yield table.schema_arrow, table.iter_batches(batch_size=_ROWS, columns=columns)
            return
        with arrow.memory_map(str(path)) as content:
            if content.read(6) == b"ARROW1":
                content.seek(0)
                whole = arrow.ipc.open_file(content)
                yield whole.schema, map(whole.get_batch, range(whole.num_record_batches))
            else:
                content.seek(0)
                stream = arrow.ipc.open_stream(content)
                yield stream.schema, iter(stream)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as {KINDS[kind]}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="a complete file",
            fix="get the file again, or move it away",
        ) from error


def _arrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(
            f"{path}: the package for reading tables is not installed",
            found="no module 'pyarrow'",
            fix="pip install 'megagrow[tables]', or convert the file to JSON lines",
        ) from error
    return pyarrow


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
