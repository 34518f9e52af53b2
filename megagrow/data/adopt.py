"""A dataset of token files that exist: nothing is copied, what is missing is added beside them.

A directory is made with the tokenizer and with ``dataset.json``, which lists the files, the ranges
of tokens of each split, counts and checksums. All tokens are read once: an id outside of the
vocabulary is an error, and how documents end is said.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagrow.data.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    Content,
    PreparedData,
    Split,
    manifest_bytes,
    open_dataset,
)
from megagrow.data.request import Adoption
from megagrow.data.token_files import (
    Int64,
    Range,
    TokenFile,
    TokenRanges,
    as_bytes,
    document_lengths,
    find_files,
    outside,
)
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import DataError
from megagrow.files import sync_directory, temporary_name, write_atomically
from megagrow.lock import holding_output


@dataclass(frozen=True)
class _Part:
    """A split: its ranges, and what one reading found in it."""

    ranges: tuple[Range, ...]
    documents: int
    sha256: str
    ends: int


def adopt(request: Adoption) -> tuple[PreparedData, list[str]]:
    """Make a dataset of existing token files.

    Returns:
        The dataset, and lines that say what was found.

    Raises:
        DataError: files that are damaged or of no known kind, ids that the vocabulary does not
            have, or an output that exists.
        LockError: another job is writing there.
    """
    output = request.output.absolute()
    tokenizer = load_tokenizer(request.tokenizer, eod=request.eod, bos=request.bos)
    files = find_files(request.tokens, dtype=request.dtype)
    held = None
    if request.validation is not None:
        held = find_files(request.validation, dtype=request.dtype)
        if files[0].dtype != held[0].dtype:
            raise DataError(
                "--validation-tokens: another token type than the training tokens",
                found=np.dtype(held[0].dtype).name,
                expected=np.dtype(files[0].dtype).name,
            )
        if both := {f.path for f in files} & {f.path for f in held}:
            raise DataError(f"{min(both)}: both in --tokens and in --validation-tokens")
    with holding_output(output):
        _require_free(output, overwrite=request.overwrite)
        train, validation = (
            _cut(files, tokenizer, request.validation_fraction)
            if held is None
            else ([Range(f, 0, f.tokens) for f in files], [Range(f, 0, f.tokens) for f in held])
        )
        parts = {
            "train": _read(train, tokenizer, "train"),
            "validation": _read(validation, tokenizer, "validation"),
        }
        data = _write(output, request, tokenizer, parts)
    return data, list(_lines(data, tokenizer, parts))


def _require_free(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = output.is_dir() and (output / MANIFEST).is_file()
    if not (ours and overwrite):
        raise DataError(
            f"--output {output}: exists",
            found="a prepared dataset" if ours else "other files",
            fix="--overwrite, or another --output" if ours else "another --output",
        )


def _cut(
    files: Sequence[TokenFile], tokenizer: Tokenizer, fraction: float
) -> tuple[list[Range], list[Range]]:
    """The last tokens validate, from the document's end that is nearest before, if one is near."""
    total = sum(file.tokens for file in files)
    want = max(1, round(total * fraction))
    left, train, validation = total - want, [], []
    for file in files:
        border = min(left, file.tokens)
        left -= border
        if 0 < border < file.tokens:
            border = _document_end(file, border, tokenizer.eod, reach=want)
        if border:
            train.append(Range(file, 0, border))
        if border < file.tokens:
            validation.append(Range(file, border, file.tokens))
    if not train or not validation:
        raise DataError(
            "--tokens: too few for a validation split",
            found=f"{total:,} tokens, --validation-fraction {fraction:g}",
            fix="--validation-tokens FILE",
        )
    return train, validation


def _document_end(file: TokenFile, border: int, eod: int, *, reach: int) -> int:
    """The last end of a document at most `reach` tokens before the border, or else the border."""
    if file.kind == "megatron":
        ends = np.cumsum(document_lengths(file))
        near = ends[(ends <= border) & (ends > border - reach)]
    else:
        first = max(0, border - reach)
        near = first + 1 + np.flatnonzero(file.map()[first:border] == eod)
    return int(near[-1]) if len(near) else border


def _read(ranges: Sequence[Range], tokenizer: Tokenizer, name: str) -> _Part:
    """Read all tokens of a split once."""
    tokens, digest = TokenRanges(ranges), hashlib.sha256()
    ends, place = 0, 0
    for chunk in tokens.chunks():
        digest.update(as_bytes(chunk))
        wrong = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if len(wrong):
            at = int(wrong[0])
            raise outside(tokens.where(place + at), int(chunk[at]), tokenizer.vocab_size, name)
        ends += int((chunk == tokenizer.eod).sum())
        place += len(chunk)
    documents = sum(len(_lengths(r)) for r in ranges)
    return _Part(tuple(ranges), documents, digest.hexdigest(), ends)


def _lengths(part: Range) -> Int64:
    """The lengths of the documents in a range; one if no index lists them."""
    if part.file.kind != "megatron":
        return np.array([part.stop - part.start])
    ends = np.cumsum(document_lengths(part.file))
    inside = ends[(ends > part.start) & (ends < part.stop)]
    return np.diff(np.concatenate([[part.start], inside, [part.stop]]))


def _write(
    output: Path, request: Adoption, tokenizer: Tokenizer, parts: dict[str, _Part]
) -> PreparedData:
    name = f"tokenizer{request.tokenizer.suffix}"
    splits = {
        split: Split(
            documents=part.documents,
            tokens=sum(r.stop - r.start for r in part.ranges),
            bin_sha256=part.sha256,
            idx_sha256="",
        )
        for split, part in parts.items()
    }
    content = Content(
        format_version=FORMAT_VERSION,
        tokenizer_file=name,
        tokenizer_sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.markers.eod,
        bos=tokenizer.markers.bos,
        dtype=np.dtype(parts["train"].ranges[0].file.dtype).name,
        **splits,
    )
    ranges = {split: [r.to_json() for r in part.ranges] for split, part in parts.items()}
    made = {"tokens": [str(path) for path in request.tokens], "ranges": ranges}
    work = temporary_name(output)
    work.mkdir(parents=True)
    try:
        shutil.copyfile(request.tokenizer, work / name)
        write_atomically(work / MANIFEST, manifest_bytes(content, made))
        open_dataset(work)
        if output.exists():
            old = temporary_name(output)
            output.rename(old)
            shutil.rmtree(old)
        work.rename(output)
        sync_directory(output.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_dataset(output)


def _lines(data: PreparedData, tokenizer: Tokenizer, parts: dict[str, _Part]) -> Iterator[str]:
    yield f"{data.path}: a dataset of token files where they are; nothing was copied"
    for name, part in parts.items():
        tokens = sum(r.stop - r.start for r in part.ranges)
        kinds = sorted({r.file.kind for r in part.ranges})
        what, dtype = f"files ({', '.join(kinds)})", data.content.dtype
        yield f"  {name:<12}{len(part.ranges):>8,} {what} {tokens:>16,} tokens, {dtype}"
        end = repr(tokenizer.name(tokenizer.eod))
        listed = f"{part.documents:,} documents listed, " if kinds == ["megatron"] else ""
        yield f"  {'':<12}{listed}{end} occurs {part.ends:,} times"
        if not part.ends:
            yield (
                f"  {'warning':<12}no document ends with {end}; the model would not learn to end. "
                "If another token ends them, --eod NAME"
            )
    yield f"  {'vocabulary':<12}{data.vocab_size:>8,} tokens, {data.content.tokenizer_file}"
