"""Convert a checkpoint from one format and layout to another: a streaming identity transfer.

The work happens in a directory next to the target, which one rename then moves into place:

    TARGET.converting-<digest>/out/         the checkpoint being written
    TARGET.converting-<digest>/done.jsonl   one line per finished piece of a file: its checksums

The digest is of what is converted and how, so the same command finds the work of an interrupted
run and resumes it after comparing the checksums of what was written.  The workers are threads:
nearly all of the work (files, copies) is done without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megagrow.background import Pool
from megagrow.checkpoint.convert.compare import compare
from megagrow.checkpoint.convert.job import (
    BUFFER_BYTES,
    ConversionReport,
    Job,
    Opened,
    Origin,
    Survey,
    open_job,
    survey_of,
)
from megagrow.checkpoint.convert.registry import get_format
from megagrow.checkpoint.interface.file_writer import write_piece
from megagrow.checkpoint.interface.format import CheckpointSource, FilePiece
from megagrow.checkpoint.interface.sidecar_checksums import write_seal
from megagrow.checkpoint.io.checksum import CHUNK_BYTES, checksum
from megagrow.checkpoint.io.files import (
    READING,
    naming,
    open_regular,
    read_exactly,
    write_all,
)
from megagrow.errors import CheckpointError
from megagrow.files import sync_directory, sync_file
from megagrow.lock import holding_output
from megagrow.state.catalog import slots_of

__all__ = ["BUFFER_BYTES", "ConversionReport", "Job", "Survey", "convert", "survey"]


def survey(job: Job, *, workers: int | None = None, buffer_bytes: int = BUFFER_BYTES) -> Survey:
    """What `convert` would do; writes nothing.

    Raises:
        MegagrowError: the source is damaged or cannot be expressed in the target's format.
    """
    return survey_of(open_job(job), workers, buffer_bytes)


def convert(
    job: Job,
    *,
    workers: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    verify: bool = False,
    moved: Callable[[int], None] = lambda count: None,
) -> ConversionReport:
    """Convert; the target appears complete or not at all.

    Args:
        workers: number of threads; by default one more than there are cores, at most 8.
        buffer_bytes: memory for values in each worker.
        verify: whether to read the result back and compare it before the rename.
        moved: called with the number of bytes written (including those of an interrupted run).

    Raises:
        MegagrowError: as `survey`; or a system call or the verification failed.
        LockError: another conversion to the same target is running, or a run trains there.
    """
    if os.path.lexists(job.target):
        # Under the lock, so that one which a killed job left is removed.
        with holding_output(job.target):
            _refuse_existing(job.target)
    opened = open_job(job)
    about = survey_of(opened, workers, buffer_bytes)
    work = job.target.with_name(f"{job.target.name}.converting-{opened.digest}")
    out, done = work / "out", work / "done.jsonl"
    with holding_output(job.target), _working_in(out, done, job.target):
        begin = time.perf_counter()
        kept = _finished(opened.pieces, out, _recorded(done))
        moved(sum(opened.pieces[i].bytes for i in kept))
        missing = about.bytes - sum(opened.pieces[i].bytes for i in kept)
        if about.free_bytes < missing:
            raise CheckpointError(
                f"{job.target.parent}: not enough disk space",
                found=f"{about.free_bytes:,} bytes free",
                expected=f"at least {missing:,} bytes free",
                fix="free disk space, or convert to another disk",
            )
        sums = dict(kept)
        todo = [i for i in range(len(opened.pieces)) if i not in kept]
        with _appending_to(done) as record:
            site = _Site(opened, work, buffer_bytes, moved, record)
            sums.update(_each(site, _write, todo, about.workers))
        seconds = time.perf_counter() - begin
        checksums: dict[str, list[str]] = {}
        for index, piece in enumerate(opened.pieces):
            checksums.setdefault(piece.name, []).extend(sums[index])
        sizes = {plan.name: plan.bytes for plan in opened.sink.files}
        _clear_small_files(out, sizes)
        notes = opened.sink.conclude(out, checksums) or ()
        _seal(opened, out, checksums)
        _sync_tree(out, sizes)
        rounded: dict[tuple[str, str], tuple[int, float]] = {}
        described: dict[str, Origin] = {}
        if verify:
            pairs = _pairs(opened, site.result)
            found = _each(site, _compare, pairs, about.workers)
            rounded = {pair: result for pair, result in found if result[0]}
            described = _described(opened, site.result)
        _commit(out, job.target)
        shutil.rmtree(work, ignore_errors=True)
    return ConversionReport(about, len(kept), seconds, verify, rounded, described, notes)


# --- the directory of the work ------------------------------------------------------------


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target}: already exists, and nothing is overwritten",
            fix=f"give another --to, or move it away: mv {target} {target}.old",
        )


@contextlib.contextmanager
def _working_in(out: Path, done: Path, target: Path) -> Iterator[None]:
    """Create the work directory; remove it again if the work fails before any piece is done."""
    _refuse_existing(target)  # by now another job may have made it
    with naming(out, "cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not _recorded(done):
            shutil.rmtree(done.parent, ignore_errors=True)
        raise


@contextlib.contextmanager
def _appending_to(path: Path) -> Iterator[Callable[[int, list[str]], None]]:
    """Open the record; yields a thread-safe function that appends a piece and its checksums."""
    lock = threading.Lock()
    with naming(path, "cannot be written"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def add(index: int, sums: list[str]) -> None:
        # Start on a new line, since a kill may have cut the last one short.
        line = f"\n{json.dumps([index, sums])}\n".encode()
        with lock, naming(path, "cannot be written"):
            write_all(descriptor, memoryview(line))

    try:
        yield add
    finally:
        os.close(descriptor)


def _recorded(path: Path) -> dict[int, list[str]]:
    """The pieces that the record lists as finished."""
    found: dict[int, list[str]] = {}
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return found
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            index, sums = json.loads(line)
            found[int(index)] = [str(one) for one in sums]
    return found


def _finished(
    pieces: Sequence[FilePiece], out: Path, recorded: Mapping[int, list[str]]
) -> dict[int, list[str]]:
    """Pieces already written by an interrupted run, after re-checking their checksums."""
    return {
        index: sums
        for index, sums in recorded.items()
        if 0 <= index < len(pieces)
        and (out / pieces[index].name).is_file()
        and _sums(out, pieces[index]) == sums
    }


def _sums(out: Path, piece: FilePiece) -> list[str] | None:
    path = out / piece.name
    stop = piece.start + piece.bytes
    with open_regular(path) as (descriptor, found), naming(path, "cannot be read", READING):
        if found != piece.file_bytes:
            return None
        data, sums = memoryview(bytearray(min(CHUNK_BYTES, piece.bytes))), []
        for start in range(piece.start, stop, CHUNK_BYTES):
            part = data[: min(CHUNK_BYTES, stop - start)]
            if not read_exactly(descriptor, part, start):
                return None
            sums.append(checksum(part))
    return sums


def _clear_small_files(out: Path, sizes: Mapping[str, int]) -> None:
    """Delete the small files that an interrupted `conclude` left."""
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(out).as_posix() not in sizes:
            path.unlink()


def _seal(opened: Opened, out: Path, checksums: Mapping[str, Sequence[str]]) -> None:
    """Write sidecar checksums if the format has none."""
    made = get_format(opened.job.target_format)
    if made.sealed:
        return
    room = made.find(out)
    assert room is not None
    below = f"{room.relative_to(out).as_posix()}/".removeprefix("./")
    sizes = {plan.name.removeprefix(below): plan.bytes for plan in opened.sink.files}
    write_seal(room, sizes, {n.removeprefix(below): sums for n, sums in checksums.items()})


def _sync_tree(out: Path, sizes: Mapping[str, int]) -> None:
    for path in (*out.rglob("*"), out):
        with naming(path, "cannot be synchronised"):
            if path.is_dir():
                sync_directory(path)
            elif path.relative_to(out).as_posix() not in sizes:
                sync_file(path)


def _commit(out: Path, target: Path) -> None:
    _refuse_existing(target)
    with naming(target, "cannot be committed"):
        os.rename(out, target)
        try:
            sync_directory(target.parent)
        except OSError:
            # Move it back, so that the same command can resume the work.
            os.rename(target, out)
            raise


# --- the work -----------------------------------------------------------------------------


@dataclass
class _Site:
    """Shared context of the workers."""

    opened: Opened
    work: Path
    buffer_bytes: int
    report: Callable[[int], None]
    finished: Callable[[int, list[str]], None]
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def result(self) -> CheckpointSource:
        """The result, open for reading."""
        return get_format(self.opened.job.target_format).open_source(self.work / "out")

    def moved(self, count: int) -> None:
        """Report progress; stops the worker if another one has failed."""
        if self.stop.is_set():
            raise CheckpointError("the conversion was ended")
        with self._lock:
            self.report(count)


def _write(site: _Site, index: int) -> list[str]:
    piece = site.opened.pieces[index]
    path = site.work / "out" / piece.name
    with naming(path.parent, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    sums = write_piece(
        path, piece, site.opened.source, buffer_bytes=site.buffer_bytes, moved=site.moved
    )
    site.finished(index, sums)
    return sums


def _pairs(opened: Opened, new: CheckpointSource) -> list[tuple[str, str]]:
    """All (tensor, slot) of the result, after checking that it has the expected tensors."""
    wanted = {tensor.name: tensor.shape for tensor in opened.source.catalog}
    found = {tensor.name: tensor.shape for tensor in new.catalog}
    slots = [slot.name for slot in new.slots]
    if wanted != found or set(slots) != {slot.name for slot in opened.sink.slots}:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[:4]
        raise CheckpointError(f"{new.path}: not what was converted", found=odd or slots)
    return [(t.name, slot.name) for t in new.catalog for slot in slots_of(t, new.slots)]


def _described(opened: Opened, new: CheckpointSource) -> dict[str, Origin]:
    """For each item of metadata that the source or the result has, whose it is in the result."""
    meta, source = opened.meta, opened.source
    items: dict[str, tuple[Any, Any, Any]] = {
        "step": (source.step, source.step, new.step),
        "configuration": (source.config, meta.config, new.config),
        "run state": (source.run_state, meta.run_state, new.run_state),
        "fingerprints": (source.fingerprints, meta.fingerprints, new.fingerprints),
    }
    found: dict[str, Origin] = {}
    for what, values in items.items():
        # Formats hold JSON: a tuple comes back as a list.
        own, asked, held = (json.dumps(v, sort_keys=True, default=str) for v in values)
        if any(json.loads(text) not in ({}, None) for text in (own, held)):
            found[what] = "source" if held == own else "given" if held == asked else "neither"
    return found


def _compare(site: _Site, pair: tuple[str, str]) -> tuple[int, float]:
    return compare(site.opened.source, site.result, *pair, buffer_bytes=site.buffer_bytes)


def _each(
    site: _Site, task: Callable[[_Site, Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result) of each item, in any order; the first error stops the work."""
    if workers == 1 or len(items) < 2:
        for item in items:
            yield item, task(site, item)
        return
    with Pool(workers, "convert") as pool:
        yield from pool.each(lambda item: task(site, item), items, on_error=site.stop.set)
