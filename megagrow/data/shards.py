"""Encode the shards of a corpus in several processes, each shard into its own files."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megagrow.background import be_a_worker
from megagrow.data.documents import TextPiece, read_documents
from megagrow.data.indexed import IndexedDataset, IndexedWriter, Tokens
from megagrow.data.markers import NONE, Markers
from megagrow.data.split import SUM, SUM_BYTES, Sums
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import DataError
from megagrow.files import write_atomically

Shard = tuple[TextPiece, ...]
_CHARACTERS = 1 << 20  # hashed at a time


class StoppedError(DataError):
    """The work was interrupted, but finished shards can be reused."""


@dataclass(frozen=True)
class ShardReport:
    """The report of a shard.

    Attributes:
        documents: number of documents written.
        empty: number of documents skipped because they have no text.
        unreadable: files that are not UTF-8 text.
    """

    documents: int
    empty: int
    unreadable: list[str]


@dataclass(frozen=True)
class Encoder:
    """Encodes shards; sent to each worker once, which then opens the tokenizer once."""

    folder: Path
    tokenizer: Path
    markers: Markers
    dtype: str
    text_key: str

    @cached_property
    def _opened(self) -> Tokenizer:
        bos = NONE if self.markers.bos is None else self.markers.bos
        return load_tokenizer(self.tokenizer, eod=self.markers.eod, bos=bos)

    def prefix(self, number: int) -> Path:
        """The path of shard ``number``."""
        return self.folder / f"shard-{number:06d}"

    def finished(self, number: int) -> ShardReport | None:
        """The report of a shard that an earlier run finished, or None."""
        try:
            report = ShardReport(**json.loads(self._report_path(number).read_bytes()))
            intact = len(IndexedDataset(self.prefix(number))) == report.documents
            summed = len(self.sums(number)) == report.documents
            return report if intact and summed else None
        except (OSError, ValueError, TypeError, DataError):
            return None

    def encode(self, number: int, shard: Shard) -> ShardReport:
        """Write the documents of ``shard``, each with its markers."""
        documents, empty = 0, 0
        sums = bytearray()
        unreadable: list[str] = []
        with IndexedWriter(self.prefix(number), self.dtype) as writer:
            for piece in shard:
                for text in read_documents(piece, text_key=self.text_key):
                    if text is None:
                        unreadable.append(str(piece.path))
                    elif not text:
                        empty += 1
                    else:
                        writer.add_document_parts(self._marked(text))
                        sums += _checksum(text)
                        documents += 1
        report = ShardReport(documents, empty, unreadable)
        write_atomically(self._sums_path(number), bytes(sums))
        write_atomically(self._report_path(number), json.dumps(asdict(report)).encode())
        return report

    def sums(self, number: int) -> Sums:
        """A checksum of the text of each document of a finished shard, ``[documents]``."""
        return np.frombuffer(self._sums_path(number).read_bytes(), SUM)

    def _marked(self, text: str) -> Iterator[Tokens]:
        if self.markers.bos is not None:
            yield np.array([self.markers.bos])
        yield from self._opened.encode_parts(text)
        yield np.array([self.markers.eod])

    def _sums_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.sums"

    def _report_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.json"


def encode_all(
    encoder: Encoder, shards: tuple[Shard, ...], *, workers: int, progress: Callable[[int], object]
) -> list[ShardReport]:
    """Encode all shards that no earlier run finished; returns the reports in order.

    Args:
        workers: number of processes; with 1 this process does the work.
        progress: called with the number of text bytes of each finished shard.

    Raises:
        DataError: bad input, or a worker was killed.
    """
    reports = {
        number: report
        for number in range(len(shards))
        if (report := encoder.finished(number)) is not None
    }

    def size(number: int) -> int:
        return sum(piece.end - piece.begin for piece in shards[number])

    for number in reports:
        progress(size(number))
    todo = [number for number in range(len(shards)) if number not in reports]

    if workers == 1 or len(todo) <= 1:
        for number in todo:
            reports[number] = encoder.encode(number, shards[number])
            progress(size(number))
        return [reports[number] for number in range(len(shards))]

    executor = ProcessPoolExecutor(
        max_workers=min(workers, len(todo)),
        # The same on every platform, and safe with threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    try:
        futures = {executor.submit(_work, number, shards[number]): number for number in todo}
        for future in as_completed(futures):
            number = futures[future]
            reports[number] = future.result()
            progress(size(number))
    except BrokenProcessPool as error:
        raise StoppedError(
            "a worker process was killed or could not start",
            expected="memory for each worker",
            fix="run again with fewer --workers: finished shards are kept",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return [reports[number] for number in range(len(shards))]


def _checksum(text: str) -> bytes:
    digest = hashlib.blake2b(digest_size=SUM_BYTES)
    for start in range(0, len(text), _CHARACTERS):
        digest.update(text[start : start + _CHARACTERS].encode())
    return digest.digest()


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    be_a_worker()


def _work(number: int, shard: Shard) -> ShardReport:
    return _encoder.encode(number, shard)
