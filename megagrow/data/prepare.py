"""Convert text to a prepared dataset: in parallel, resumable and atomic.

All work is done in ``OUTPUT.work`` next to the output::

    lock          held by the one process that prepares this output
    plan-KEY/     KEY is the checksum of inputs and arguments
      tokenizer.*
      shard-N.bin .idx .sums .json    finished shards; .json comes last and makes them valid
      final/      the dataset, renamed to OUTPUT when complete
    old/          the output that is being replaced

A run with the same inputs and arguments continues with the finished shards of one that was killed
or stopped, or that ran out of space; a run with others removes them. A run that fails because of
its input removes everything: once fixed, the input is different.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megagrow.data import dataset
from megagrow.data.corpus import Corpus, open_corpus
from megagrow.data.documents import read_documents
from megagrow.data.files import sha256_file
from megagrow.data.indexed import IndexedDataset, IndexedWriter, idx_path
from megagrow.data.markers import Markers
from megagrow.data.permutation import mixed
from megagrow.data.request import Request, require_dtype
from megagrow.data.shards import Encoder, StoppedError, encode_all
from megagrow.data.split import Chosen, choose
from megagrow.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megagrow.errors import DataError, MegagrowError
from megagrow.files import sync_directory, write_atomically
from megagrow.lock import holding_output

# The version of the conversion; 1 if a manifest has none.
VERSION = 2
_AGAIN = "run the same command again: finished shards are kept"


@dataclass(frozen=True)
class Preparation:
    """The result of :func:`prepare`; ``fresh`` is False if the output existed already."""

    data: dataset.PreparedData
    fresh: bool

    @property
    def outdated(self) -> bool:
        """Whether it existed from an earlier version, which split documents differently."""
        return _version(self.data.made) != VERSION


def prepare(request: Request) -> Preparation:
    """Create the dataset of ``request``, unless it exists already.

    Raises:
        DataError: bad input; a different existing output and no ``overwrite``; another process
            working on the same output; no space.
    """
    try:
        return _prepare(replace(request, output=request.output.resolve()))
    except OSError as error:
        raise DataError(
            f"{error.filename or request.output}: {error.strerror or error}",
            fix=f"free space or permit access, then {_AGAIN}",
        ) from error


def _prepare(request: Request) -> Preparation:
    output = request.output
    work = output.with_name(output.name + ".work")
    markers = None
    if request.tokenizer:
        given = load_tokenizer(request.tokenizer, eod=request.eod, bos=request.bos)
        require_dtype(request.dtype, given.vocab_size)
        markers = given.markers
    corpus = _open_corpus(request, work)
    made = {
        "input": request.input,
        "fingerprint": corpus.fingerprint,
        "arguments": request.arguments(markers),
        "version": VERSION,
    }
    if not work.exists() and _is_prepared(request, made):
        return Preparation(dataset.open_dataset(output), fresh=False)

    with holding_output(output):
        _require_ours(work)
        old = work / "old"
        if old.exists() and not output.exists():
            # Killed between moving the old output away and the new one into place.
            os.rename(old, output)
        if _is_prepared(request, made):
            shutil.rmtree(work)
            return Preparation(dataset.open_dataset(output), fresh=False)
        plan = work / f"plan-{_key(made)}"
        for other in work.iterdir():
            if other != plan:
                shutil.rmtree(other)
        plan.mkdir(exist_ok=True)
        try:
            final = _build(request, corpus, plan=plan, made=made, markers=markers)
            if _open_corpus(request, work).fingerprint != corpus.fingerprint:
                raise DataError(
                    f"--input {request.input}: changed while it was being prepared",
                    fix="run again when it no longer changes",
                )
            dataset.open_dataset(final)
        except StoppedError:
            raise
        except MegagrowError:
            shutil.rmtree(work)
            raise
        if output.exists():
            os.rename(output, old)
        os.rename(final, output)
        sync_directory(output.parent)
        shutil.rmtree(work)
    return Preparation(dataset.open_dataset(output), fresh=True)


def _open_corpus(request: Request, work: Path) -> Corpus:
    return open_corpus(
        request.input,
        glob=request.glob,
        split=request.documents,
        exclude=(request.output, work),
        form=request.form,
        text_key=request.key,
    )


def _key(made: dict[str, Any]) -> str:
    identity = [dataset.FORMAT_VERSION, VERSION, made["fingerprint"], made["arguments"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _is_prepared(request: Request, made: dict[str, Any]) -> bool:
    """Whether the requested output exists; False if it has to be created.

    Raises:
        DataError: something else exists there that may not be replaced.
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
            fix="another --output",
        )
    if request.overwrite:
        # A damaged output may be replaced too.
        try:
            data = dataset.open_dataset(output)
            dataset.verify(data)
        except DataError:
            return False
        return _same(_as_made(data), made) and _version(data.made) == VERSION
    found = _as_made(dataset.open_dataset(output))
    if not _same(found, made):
        raise DataError(
            f"--output {output}: holds a dataset made from other text or with other arguments",
            found=_difference(found, made),
            fix="--overwrite, or another --output",
        )
    return True


def _version(made: dict[str, Any]) -> int:
    return int(made.get("version", 1))


def _as_made(data: dataset.PreparedData) -> dict[str, Any]:
    """How a dataset was created; derived from its content if it was not recorded."""
    arguments = dict(data.made.get("arguments", {}))
    if _version(data.made) == 1:
        given = arguments.get("tokenizer_sha256") is not None
        arguments.setdefault("format", "auto")
        arguments.setdefault("eod", data.content.eod if given else None)
        arguments.setdefault("bos", data.content.bos)
    return {**data.made, "arguments": arguments}


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
    """Create the work directory, or check that an existing one is a work directory."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "lock").unlink(missing_ok=True)  # of versions that kept it there
    strangers = [path.name for path in work.iterdir() if not path.name.startswith(("plan-", "old"))]
    if strangers:
        raise DataError(f"{work}: is not ours", found=strangers, fix="another --output")


def _build(
    request: Request, corpus: Corpus, *, plan: Path, made: dict[str, Any], markers: Markers | None
) -> Path:
    """Create tokenizer, shards, splits and manifest; returns the finished directory."""
    tokenizer = _tokenizer(request, corpus, plan)
    markers = markers or tokenizer.markers
    dtype = require_dtype(request.dtype, tokenizer.vocab_size)
    encoder = Encoder(plan, tokenizer.path, markers, dtype, request.key)
    with tqdm(
        total=corpus.size, desc="tokens", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        reports = encode_all(encoder, corpus.shards, workers=request.workers, progress=bar.update)
    unreadable = [name for report in reports for name in report.unreadable]
    if not any(report.documents for report in reports):
        raise _nothing(request, unreadable)

    final = plan / "final"
    if final.exists():
        shutil.rmtree(final)
    final.mkdir()
    chosen, splits = _split(request, encoder, len(corpus.shards), final=final)
    shutil.copyfile(tokenizer.path, final / tokenizer.path.name)
    content = dataset.Content(
        format_version=dataset.FORMAT_VERSION,
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=markers.eod,
        bos=markers.bos,
        dtype=dtype,
        **splits,
    )
    notes = {
        "files": corpus.files,
        "bytes": corpus.size,
        "formats": {name: asdict(group) for name, group in corpus.formats.items()},
        "left_out": {why: asdict(group) for why, group in corpus.left_out.items()},
        "unreadable_files": len(unreadable),
        "unreadable_examples": unreadable[:20],
        "empty_documents": sum(report.empty for report in reports),
        "cut_documents": chosen.cut,
        "copies": chosen.copies,
        "shared_documents": chosen.shared,
        "markers": {
            "eod": tokenizer.name(markers.eod),
            "bos": None if markers.bos is None else tokenizer.name(markers.bos),
            "why": markers.why,
        },
    }
    write_atomically(final / dataset.MANIFEST, dataset.manifest_bytes(content, {**made, **notes}))
    return final


def _tokenizer(request: Request, corpus: Corpus, plan: Path) -> Tokenizer:
    """Copy the given tokenizer, or train one on a sample of the corpus."""
    if request.tokenizer:
        path = plan / f"tokenizer{request.tokenizer.suffix}"
        write_atomically(path, request.tokenizer.read_bytes())
        given = load_tokenizer(request.tokenizer, eod=request.eod, bos=request.bos)
        return load_tokenizer(path, eod=given.eod)
    path = plan / "tokenizer.model"
    if not path.exists():
        texts = _sample(request, corpus)
        write_atomically(path, train_sentencepiece(texts, vocab_size=request.vocab_size))
    return load_tokenizer(path)


def _sample(request: Request, corpus: Corpus) -> list[str]:
    """Text sampled from the whole corpus, up to the given number of characters."""
    pieces = corpus.pieces
    order = sorted(range(len(pieces)), key=lambda number: mixed(request.seed, number))
    share = max(1 << 16, request.tokenizer_sample // max(1, len(pieces)))
    texts: list[str] = []
    unreadable: list[str] = []
    total = 0
    for number in order:
        taken = 0
        for text in read_documents(pieces[number], text_key=request.key):
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
    request: Request, encoder: Encoder, shards: int, *, final: Path
) -> tuple[Chosen, dict[str, dataset.Split]]:
    """Distribute the documents of all shards over the splits; see :mod:`megagrow.data.split`."""
    parts = [IndexedDataset(encoder.prefix(number)) for number in range(shards)]
    chosen = choose(
        np.concatenate([part.lengths for part in parts]).astype(np.int64),
        np.concatenate([encoder.sums(number) for number in range(shards)]),
        fraction=request.validation_fraction,
        seed=request.seed,
    )
    markers = encoder.markers
    begin = [] if markers.bos is None else [np.array([markers.bos])]
    with (
        IndexedWriter(final / "train", encoder.dtype) as train,
        IndexedWriter(final / "validation", encoder.dtype) as validation,
    ):
        start = 0
        for part in parts:
            ends = chosen.tokens[start : start + len(part)]
            start += len(part)
            cut = (ends > 0) & (ends < part.lengths)
            # Runs of documents that go to the same split; a document that is cut is a separate run.
            changes = np.diff(ends > 0) | cut[1:] | cut[:-1]
            borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(part)]
            for first, last in pairwise(borders):
                if first == last:
                    continue
                if cut[first]:
                    tokens, at = part[first], int(part.lengths[first] - ends[first])
                    train.add_document_parts([tokens[:at], np.array([markers.eod])])
                    validation.add_document_parts([*begin, tokens[at:]])
                else:
                    (validation if ends[first] else train).add_part(part, first, last)
    return chosen, {
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


__all__ = ["Preparation", "Request", "prepare"]
