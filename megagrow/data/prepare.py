"""Text to a prepared dataset, by many processes, resumable, whole or not at all.

All work is done in ``OUTPUT.work`` beside the output::

    lock          held by the one process that prepares this output
    plan-KEY/     KEY is the checksum of inputs and arguments
      tokenizer.*
      shard-N.bin .idx .json    finished shards; .json comes last and makes them valid
      final/      the dataset, renamed to OUTPUT when complete
    old/          the output that is being replaced

A run with the same inputs and arguments goes on with the finished shards of one
that was killed; a run with others removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megagrow.data import dataset
from megagrow.data.corpus import Corpus, open_corpus, read_documents
from megagrow.data.files import sha256_file
from megagrow.data.indexed import IndexedDataset, IndexedWriter, dtype_for, idx_path
from megagrow.data.permutation import mixed
from megagrow.data.shards import Encoder, encode_all
from megagrow.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megagrow.errors import DataError
from megagrow.files import sync_directory, write_atomically
from megagrow.lock import holding_output

DTYPES = ("auto", "uint16", "int32")
_AGAIN = "run the same command again: finished shards are kept"


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
    text_key: str = "text"
    documents: str = "file"
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        def require(holds: bool, option: str, found: object, expected: str) -> None:
            if not holds:
                raise DataError(f"{option}: out of range", found=found, expected=expected)

        fraction = self.validation_fraction
        require(0 <= fraction < 1, "--validation-fraction", fraction, "0 <= fraction < 1")
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
        require(self.vocab_size >= 1, "--vocab-size", self.vocab_size, "at least 1")
        require(self.tokenizer_sample >= 1, "--tokenizer-sample", self.tokenizer_sample, ">= 1")
        require(self.dtype in DTYPES, "--dtype", self.dtype, " or ".join(DTYPES))

    def arguments(self) -> dict[str, Any]:
        """What the content of the dataset depends on, besides the text."""
        return {
            "tokenizer_sha256": sha256_file(self.tokenizer) if self.tokenizer else None,
            "vocab_size": None if self.tokenizer else self.vocab_size,
            "tokenizer_sample": None if self.tokenizer else self.tokenizer_sample,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "dtype": self.dtype,
            "glob": self.glob,
            "text_key": self.text_key,
            "documents": self.documents,
        }


@dataclass(frozen=True)
class Outcome:
    """What :func:`prepare` did: ``fresh`` is False if the output was there already."""

    data: dataset.PreparedData
    fresh: bool


def prepare(request: Request) -> Outcome:
    """Make the dataset that ``request`` asks for, or find that it is there.

    Raises:
        DataError: bad input; an output made otherwise and no ``overwrite``; another
            process at work on the same output; no space.
    """
    try:
        return _prepare(replace(request, output=request.output.resolve()))
    except OSError as error:
        raise DataError(
            f"{error.filename or request.output}: {error.strerror or error}",
            mend=f"free space or permit access, then {_AGAIN}",
        ) from error


def _prepare(request: Request) -> Outcome:
    output = request.output
    work = output.with_name(output.name + ".work")
    if request.tokenizer:
        load_tokenizer(request.tokenizer)
    corpus = _open_corpus(request, work)
    made = {
        "input": request.input,
        "fingerprint": corpus.fingerprint,
        "arguments": request.arguments(),
    }
    if not work.exists() and _is_prepared(request, made):
        return Outcome(dataset.open_dataset(output), fresh=False)

    with holding_output(output):
        _require_ours(work)
        old = work / "old"
        if old.exists() and not output.exists():
            # Killed between taking the old output away and putting the new one there.
            os.rename(old, output)
        if _is_prepared(request, made):
            shutil.rmtree(work)
            return Outcome(dataset.open_dataset(output), fresh=False)
        plan = work / f"plan-{_key(made)}"
        for other in work.iterdir():
            if other != plan:
                shutil.rmtree(other)
        plan.mkdir(exist_ok=True)
        final = _build(request, corpus, plan=plan, made=made)
        if _open_corpus(request, work).fingerprint != corpus.fingerprint:
            raise DataError(
                f"--input {request.input}: changed while it was being prepared",
                mend="run again when it no longer changes",
            )
        dataset.open_dataset(final)
        if output.exists():
            os.rename(output, old)
        os.rename(final, output)
        sync_directory(output.parent)
        shutil.rmtree(work)
    return Outcome(dataset.open_dataset(output), fresh=True)


def _open_corpus(request: Request, work: Path) -> Corpus:
    return open_corpus(
        request.input,
        glob=request.glob,
        split=request.documents,
        exclude=(request.output, work),
    )


def _key(made: dict[str, Any]) -> str:
    identity = [dataset.FORMAT_VERSION, made["fingerprint"], made["arguments"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _is_prepared(request: Request, made: dict[str, Any]) -> bool:
    """Whether the output is there as asked for; False if it is to be made.

    Raises:
        DataError: something else is there that may not be replaced.
    """
    output = request.output
    if output.is_dir() and not any(output.iterdir()):
        return False
    if not output.exists():
        return False
    if not (output / dataset.MANIFEST).is_file():
        raise DataError(
            f"--output {output}: exists and is no prepared dataset",
            expected="a name that is free, an empty directory, or a prepared dataset",
            mend="another --output",
        )
    if request.overwrite:
        # A damaged output may be replaced as well.
        try:
            data = dataset.open_dataset(output)
            dataset.verify(data)
        except DataError:
            return False
        return _same(data.made, made)
    found = dataset.open_dataset(output).made
    if not _same(found, made):
        raise DataError(
            f"--output {output}: holds a dataset made from other text or with other arguments",
            found=_difference(found, made),
            mend="--overwrite, or another --output",
        )
    return True


def _same(found: dict[str, Any], made: dict[str, Any]) -> bool:
    return all(found.get(name) == made[name] for name in ("fingerprint", "arguments"))


def _difference(found: dict[str, Any], made: dict[str, Any]) -> str:
    before = found.get("arguments", {})
    changed = [
        f"{name} {before.get(name)!r}, asked for {value!r}"
        for name, value in made["arguments"].items()
        if before.get(name) != value
    ]
    if found.get("fingerprint") != made["fingerprint"]:
        changed.append(f"text of {found.get('input')!r}, not as {made['input']!r} is now")
    return "; ".join(changed)


def _require_ours(work: Path) -> None:
    """Make the directory of the work, or see that it is one of those."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "lock").unlink(missing_ok=True)  # of versions that had it there
    strangers = [path.name for path in work.iterdir() if not path.name.startswith(("plan-", "old"))]
    if strangers:
        raise DataError(f"{work}: is not ours", found=strangers, mend="another --output")


def _build(request: Request, corpus: Corpus, *, plan: Path, made: dict[str, Any]) -> Path:
    """Tokenizer, shards, splits and manifest; returns the finished directory."""
    tokenizer = _tokenizer(request, corpus, plan)
    dtype = dtype_for(tokenizer.vocab_size) if request.dtype == "auto" else request.dtype
    largest = np.iinfo(np.dtype(dtype)).max
    if tokenizer.vocab_size - 1 > largest:
        raise DataError(
            f"--dtype {dtype}: too small for the vocabulary",
            found=f"{tokenizer.vocab_size} tokens",
            expected=f"at most {largest + 1}",
            mend="--dtype int32",
        )
    encoder = Encoder(folder=plan, tokenizer=tokenizer.path, dtype=dtype, text_key=request.text_key)
    with tqdm(
        total=corpus.size, desc="tokens", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        reports = encode_all(encoder, corpus.shards, workers=request.workers, progress=bar.update)
    unreadable = [name for report in reports for name in report.unreadable]
    parts = [encoder.prefix(number) for number in range(len(corpus.shards))]

    final = plan / "final"
    if final.exists():
        shutil.rmtree(final)
    final.mkdir()
    splits = _split(request, parts, final=final, dtype=dtype, unreadable=unreadable)
    shutil.copyfile(tokenizer.path, final / tokenizer.path.name)
    content = dataset.Content(
        format_version=dataset.FORMAT_VERSION,
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=dtype,
        **splits,
    )
    counts = {
        "files": corpus.files,
        "bytes": corpus.size,
        "unreadable_files": len(unreadable),
        "unreadable_examples": unreadable[:20],
        "empty_documents": sum(report.empty for report in reports),
    }
    write_atomically(final / dataset.MANIFEST, dataset.manifest_bytes(content, {**made, **counts}))
    return final


def _tokenizer(request: Request, corpus: Corpus, plan: Path) -> Tokenizer:
    """The given tokenizer, copied, or one trained on a sample of the corpus."""
    if request.tokenizer:
        path = plan / f"tokenizer{request.tokenizer.suffix}"
        write_atomically(path, request.tokenizer.read_bytes())
        return load_tokenizer(path)
    path = plan / "tokenizer.model"
    if not path.exists():
        texts = _sample(request, corpus)
        write_atomically(path, train_sentencepiece(texts, vocab_size=request.vocab_size))
    return load_tokenizer(path)


def _sample(request: Request, corpus: Corpus) -> list[str]:
    """Text from all over the corpus, as many characters as asked for."""
    pieces = corpus.pieces
    order = sorted(range(len(pieces)), key=lambda number: mixed(request.seed, number))
    share = max(1 << 16, request.tokenizer_sample // max(1, len(pieces)))
    texts: list[str] = []
    unreadable: list[str] = []
    total = 0
    for number in order:
        taken = 0
        for text in read_documents(pieces[number], text_key=request.text_key):
            if text is None:
                unreadable.append(str(pieces[number].path))
                break
            if taken >= share:
                break
            texts.append(text[: share - taken])
            taken += len(texts[-1])
        total += taken
        if total >= request.tokenizer_sample:
            break
    if not total:
        raise _nothing(request, unreadable)
    return texts


def _split(
    request: Request, parts: list[Path], *, final: Path, dtype: str, unreadable: list[str]
) -> dict[str, dataset.Split]:
    """Deal the documents of all parts to the two splits.

    Document i is for validation if its hash, as a fraction, is below the one asked
    for.  Of a small corpus without such a document, the one with the least hash is.
    """
    datasets = [IndexedDataset(part) for part in parts]
    total = sum(len(part) for part in datasets)
    if not total:
        raise _nothing(request, unreadable)
    hashes = [mixed(request.seed, 1, number) for number in range(total)]
    limit = request.validation_fraction * 2.0**64
    chosen = np.array([value < limit for value in hashes])
    if request.validation_fraction > 0 and not 0 < chosen.sum() < total:
        if total == 1:
            raise DataError(
                f"--input {request.input}: one document cannot be split",
                expected="two documents at least",
                mend="--documents paragraph (split at blank lines), or --validation-fraction 0",
            )
        least = hashes.index(min(hashes))
        chosen = np.arange(total) == least

    with (
        IndexedWriter(final / "train", dtype) as train,
        IndexedWriter(final / "validation", dtype) as validation,
    ):
        start = 0
        for part in datasets:
            mine = chosen[start : start + len(part)]
            start += len(part)
            borders = [0, *(np.flatnonzero(np.diff(mine)) + 1).tolist(), len(part)]
            for first, last in pairwise(borders):
                if first < last:
                    (validation if mine[first] else train).add_part(part, first, last)
    return {
        name: _describe(final / name, writer)
        for name, writer in zip(dataset.SPLITS, (train, validation), strict=True)
    }


def _describe(prefix: Path, writer: IndexedWriter) -> dataset.Split:
    written = IndexedDataset(prefix)
    return dataset.Split(
        documents=written.document_count,
        tokens=written.total_tokens,
        bin_sha256=writer.bin_sha256,
        idx_sha256=sha256_file(idx_path(prefix)),
    )


def _nothing(request: Request, unreadable: list[str]) -> DataError:
    found = "empty files only"
    if unreadable:
        found = f"{len(unreadable)} files that are not UTF-8 text, such as {unreadable[0]}"
    return DataError(
        f"--input {request.input}: no text in it",
        found=found,
        expected="UTF-8 text",
    )
