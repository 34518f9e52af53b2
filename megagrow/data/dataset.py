"""A prepared dataset: a directory with all data that training needs.

::

    train.bin  train.idx  validation.bin  validation.idx
    tokenizer.model (or tokenizer.json)
    dataset.json    describes the other files

``dataset.json`` has two parts: ``content`` (counts, types, checksums), which is the same wherever
the same data is prepared, and ``made`` (source and arguments).  The fingerprint is the sha256 of
``content`` alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from megagrow.data.files import sha256_file
from megagrow.data.indexed import IndexedDataset, bin_path, idx_path
from megagrow.data.markers import NONE
from megagrow.data.token_files import Range, TokenRanges
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import DataError
from megagrow.files import or_shipped

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """The manifest's description of one split."""

    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class Content:
    """The manifest's description of the data itself."""

    format_version: int
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    dtype: str
    train: Split
    validation: Split
    bos: int | None = None  # id of the token that begins each document, if any

    def record(self) -> dict[str, Any]:
        """A form that JSON holds; without ``bos`` if there is none, as in earlier versions."""
        record = asdict(self)
        if self.bos is None:
            del record["bos"]
        return record

    def fingerprint(self) -> str:
        """sha256 of the content: equal for equal data, wherever and however it was prepared."""
        canonical = json.dumps(self.record(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class PreparedData:
    """An opened dataset directory.

    Attributes:
        path: the directory.
        content: counts and checksums.
        made: the source and the arguments of the preparation.
        train, validation: the splits, memory-mapped.
    """

    path: Path
    content: Content
    made: dict[str, Any]
    train: IndexedDataset | TokenRanges
    validation: IndexedDataset | TokenRanges

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data, loaded on first use."""
        bos = NONE if self.content.bos is None else self.content.bos
        path = self.path / self.content.tokenizer_file
        return load_tokenizer(path, eod=self.content.eod, bos=bos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.content.vocab_size

    @property
    def eod(self) -> int:
        """Id of the token that ends each document."""
        return self.content.eod

    @property
    def fingerprint(self) -> str:
        """sha256 of the data's counts and checksums."""
        return self.content.fingerprint()


def manifest_bytes(content: Content, made: dict[str, Any]) -> bytes:
    """The file ``dataset.json``."""
    record = {"content": content.record(), "made": made}
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def read_manifest(directory: Path) -> tuple[Content, dict[str, Any]]:
    """Read ``dataset.json`` of ``directory``.

    Raises:
        DataError: the directory or file is missing, damaged, or of another version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{directory}: not a prepared dataset",
            found=_instead(directory),
            fix=_first_preparation(directory),
        )
    fix = prepare_again({}, directory)
    try:
        record = json.loads(path.read_bytes())
        content = dict(record["content"])
        made = dict(record["made"])
        fix = prepare_again(made, directory)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: unknown version", found=version, expected=FORMAT_VERSION, fix=fix
            )
        for split in SPLITS:
            content[split] = _typed(Split, content[split])
        checked: Content = _typed(Content, content)
        if Path(checked.tokenizer_file).name != checked.tokenizer_file:
            raise ValueError(f"tokenizer_file {checked.tokenizer_file!r} is not a plain name")
        return checked, made
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged", found=f"{type(error).__name__}: {error}", fix=fix
        ) from error


# Arguments of `prepare_data.py` that the manifest keeps; a given tokenizer is only a checksum.
_OPTIONS = {
    "vocab_size": 4096, "tokenizer_sample": 8 << 20, "validation_fraction": 0.01, "seed": 1234,
    "dtype": "auto", "glob": "*", "format": "auto", "text_key": "text", "documents": "file",
}  # fmt: skip


def ranges_of(directory: Path, made: Mapping[str, Any], split: str) -> list[Range] | None:
    """The ranges of files elsewhere that a split consists of; None if it has files of its own.

    Raises:
        DataError: the manifest is damaged.
    """
    if "ranges" not in made:
        return None
    try:
        return [Range.from_json(one) for one in made["ranges"][split]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{directory / MANIFEST}: damaged",
            found=f"{type(error).__name__}: {error}",
            fix=prepare_again(made, directory),
        ) from error


def prepare_again(made: Mapping[str, Any], directory: Path) -> str:
    """The command that rebuilds a damaged dataset, as far as its manifest records it."""
    if isinstance(made.get("tokens"), list):
        words = ["--tokens", *map(str, made["tokens"]), "--tokenizer", "TOKENIZER"]
        words += ["--output", str(directory), "--overwrite"]
        return f"python launch/prepare_data.py {shlex.join(words)}"
    given = made.get("arguments", {}) if isinstance(made.get("arguments", {}), dict) else {}
    words = ["--input", str(made.get("input", "TEXT")), "--output", str(directory), "--overwrite"]
    for key, default in _OPTIONS.items():
        if given.get(key) not in (None, default):
            words += [f"--{key.replace('_', '-')}", str(given[key])]
    if given.get("tokenizer_sha256") is not None:
        words += ["--tokenizer", "TOKENIZER"]
    return f"python launch/prepare_data.py {shlex.join(words)}"


@contextlib.contextmanager
def as_prepared_by(config: str | Path, *data: str) -> Iterator[None]:
    """Context manager: errors for a missing dataset show the command from the config's comments.

    Args:
        config: the configuration file.
        data: the datasets that it names.
    """
    try:
        yield
    except DataError as error:
        missing = [path for path in data if not (Path(path) / MANIFEST).exists()]
        command = _recipe(Path(config), missing[0]) if missing else None
        if command is None:
            raise
        raise DataError(
            f"{missing[0]}: not a prepared dataset",
            found=_instead(Path(missing[0])),
            expected=f"what {config} says it was made by",
            fix=command,
        ) from error


def _recipe(config: Path, data: str) -> str | None:
    """The command in a file's comments that prepares a directory; lines end in a backslash."""
    try:
        text = or_shipped(config).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    comments = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for command in comments.replace("\\\n", " ").splitlines():
        words = command.split()
        if words[:2] == ["python", "launch/prepare_data.py"] and ["--output", data] in map(
            list, pairwise(words)
        ):
            return " ".join(words)
    return None


def _instead(path: Path) -> str:
    if path.is_dir():
        return f"it has no {MANIFEST}"
    return "a file" if path.exists() else "no such directory"


def _first_preparation(path: Path) -> str:
    """The command that prepares a text given instead of a dataset, or any text as `path`."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        made = Path("data") / (path.stem or "mine")
        command = shlex.join(["--input", str(path), "--output", str(made)])
        return f"python launch/prepare_data.py {command}, then data.path={made}"
    command = shlex.join(["--input", "TEXT", "--output", str(path)])
    return f"python launch/prepare_data.py {command}, where TEXT is your file or directory of text"


def _typed(kind: type[Any], values: dict[str, Any]) -> Any:
    """Create a record of ``kind``, checking the type of each value."""
    made = kind(**values)
    for name, annotation in kind.__annotations__.items():
        value = getattr(made, name)
        if type(value).__name__.removesuffix("Type") not in annotation.split(" | "):
            raise TypeError(f"{name} is {value!r}, should be {annotation}")
    return made


def open_dataset(path: str | Path, tokenizer: str | Path | None = None) -> PreparedData:
    """Open a prepared dataset and check that its parts are consistent.

    Sizes, headers, indices, counts and the tokenizer's checksum are checked; the
    checksums of the token files are not, see :func:`verify`.

    Args:
        path: the directory that prepare_data.py wrote.
        tokenizer: a tokenizer file that must equal the dataset's own, if given.

    Raises:
        DataError: the directory or a file is missing, damaged or inconsistent with the rest.
    """
    directory = Path(path)
    content, made = read_manifest(directory)
    fix = prepare_again(made, directory)

    own = directory / content.tokenizer_file
    _check(own, "tokenizer", _checksum(own, fix), content.tokenizer_sha256, fix)
    if tokenizer is not None:
        _check(
            Path(tokenizer),
            f"tokenizer and dataset {directory} disagree",
            load_tokenizer(tokenizer, eod=content.eod).fingerprint(),
            content.tokenizer_sha256,
            f"leave out data.tokenizer, or prepare the data again with --tokenizer {tokenizer}",
        )
    splits: dict[str, IndexedDataset | TokenRanges] = {}
    for name in SPLITS:
        split: Split = getattr(content, name)
        if (ranges := ranges_of(directory, made, name)) is not None:
            tokens = splits[name] = TokenRanges(ranges, content.vocab_size)
            manifest = directory / MANIFEST
            _check(manifest, f"tokens of {name}", tokens.total_tokens, split.tokens, fix)
            continue
        data = splits[name] = IndexedDataset(directory / name, content.vocab_size)
        index = idx_path(data.prefix)
        _check(index, "token type", data.dtype.name, content.dtype, fix)
        _check(index, "number of documents", data.document_count, split.documents, fix)
        _check(index, "number of tokens", data.total_tokens, split.tokens, fix)
    return PreparedData(directory, content, made, **splits)


def verify(data: PreparedData) -> int:
    """Read all files of an opened dataset and verify their checksums.

    Returns:
        The number of bytes read.

    Raises:
        DataError: a file does not match ``dataset.json``.
    """
    fix = prepare_again(data.made, data.path)
    size = 0
    for name in SPLITS:
        split: Split = getattr(data.content, name)
        tokens = getattr(data, name)
        if isinstance(tokens, TokenRanges):
            _check(tokens.prefix, f"checksum of {name}", tokens.sha256(), split.bin_sha256, fix)
            size += tokens.total_tokens * tokens.dtype.itemsize
            continue
        for file, expected in (
            (bin_path(data.path / name), split.bin_sha256),
            (idx_path(data.path / name), split.idx_sha256),
        ):
            _check(file, "checksum", _checksum(file, fix), expected, fix)
            size += file.stat().st_size
    return size


def _checksum(path: Path, fix: str) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read", found=error.strerror, fix=fix) from error


def _check(path: Path, what: str, found: object, expected: object, fix: str) -> None:
    if found != expected:
        raise DataError(
            f"{path}: {what}", found=found, expected=f"{expected} ({MANIFEST})", fix=fix
        )
