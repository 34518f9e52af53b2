"""Convert a checkpoint from one format and layout to another: a streaming identity transfer.

The work is done beside the target and shows there by one rename:

    TARGET.converting-<digest>/out/     the checkpoint that is to be
    TARGET.converting-<digest>/done/    a record of each finished file, with its checksums

The digest is of what is converted and how, so the same command finds the work of one that was
killed, and goes on after comparing the checksums of what it left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import megagrow
from megagrow.checkpoint.adapter import FilePlan, Request, Sink, Source
from megagrow.checkpoint.directory import (
    READING,
    naming,
    open_regular,
    sync_directory,
    write_all,
)
from megagrow.checkpoint.formats import detect, get_format
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.native import read_exactly
from megagrow.checkpoint.shape import catalog_for
from megagrow.checkpoint.shards import CHUNK_BYTES, checksum
from megagrow.checkpoint.writing import LEAST_BUFFER_BYTES, compare, write_file
from megagrow.errors import CheckpointError, MegagrowError
from megagrow.layout import Layout

BUFFER_BYTES = 64 << 20
_WORTH_A_WORKER = 512 << 20  # bytes: a process takes seconds to start
_SOURCE_BYTES = CHUNK_BYTES  # greatest buffer of a source


@dataclass(frozen=True)
class Job:
    """What to convert, and into what.

    Attributes:
        source, source_format: what to read; the format is detected where it is None.
        target, target_format: what to make; nothing may be at `target`.
        layout: of the target; the source's where it is None.
        dtype: element type of all values, or None: what the format demands, else the source's.
        tokenizer: a file or a directory to carry along.
        file_bytes: greatest size of a file, for formats that cut by size.
        run_state: for a source that tells none.
        config, fingerprints: of a run that is to start from the result, in place of the source's.
    """

    source: Path
    target: Path
    target_format: str
    source_format: str | None = None
    layout: Layout | None = None
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    file_bytes: int = 5 << 30
    run_state: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    fingerprints: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Survey:
    """What a conversion takes and leaves.

    Attributes:
        source_format: as given or detected.
        bytes: of the files with values.
        disk_bytes: needed where the target will be: no more than the target itself.
        free_bytes: there now.
        memory_bytes: greatest memory for values, all workers together.
        left_out: slots of the source that the target does not hold.
        made: slots of the target that the source does not have: zeros.
    """

    source_format: str
    source: Path
    files: int
    bytes: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    workers: int
    left_out: tuple[str, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        kept: files that a killed run had finished.
        seconds: of reading and writing, without the verification.
        rounded: where verified, for each (tensor, slot) whose element type changed: number of
            values that differ, and the greatest difference relative to the greatest value.
    """

    survey: Survey
    kept: int
    seconds: float
    verified: bool
    rounded: Mapping[tuple[str, str], tuple[int, float]]


@dataclass(frozen=True)
class _Opened:
    job: Job
    source: Source
    sink: Sink
    digest: str


def survey(job: Job, *, workers: int | None = None, buffer_bytes: int = BUFFER_BYTES) -> Survey:
    """What `convert` would do; writes nothing.

    Raises:
        MegagrowError: the source is damaged or cannot be expressed in the target's format.
    """
    return _survey(_open(job), workers, buffer_bytes)


def convert(
    job: Job,
    *,
    workers: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    verify: bool = False,
    moved: Callable[[int], None] = lambda count: None,
) -> Report:
    """Convert; the target appears complete or not at all.

    Args:
        workers: processes; by default as many as there are cores and files, and 1 for less
            than half a GiB.
        buffer_bytes: memory for values in each worker.
        verify: whether to read the result back and compare before it shows at the target.
        moved: told of bytes written (and of those that a killed run had written).

    Raises:
        MegagrowError: as `survey`; or the system refused, or the verification failed.
    """
    opened = _open(job)
    about = _survey(opened, workers, buffer_bytes)
    _refuse_existing(job.target)
    work = job.target.with_name(f"{job.target.name}.converting-{opened.digest}")
    with _working_in(work):
        out, done = work / "out", work / "done"
        begin = time.perf_counter()
        kept = _finished(opened.sink, out, done)
        sizes = {plan.name: plan.bytes for plan in opened.sink.files}
        moved(sum(sizes[name] for name in kept))
        missing = sum(size for name, size in sizes.items() if name not in kept)
        if about.free_bytes < missing:
            raise CheckpointError(
                f"{job.target.parent}: not enough disk space",
                found=f"{about.free_bytes:,} bytes free",
                expected=f"at least {missing:,} bytes free",
                mend="free disk space, or convert to another disk",
            )
        todo = [i for i, plan in enumerate(opened.sink.files) if plan.name not in kept]
        crew = _Crew(opened, work, about.workers, buffer_bytes)
        checksums = dict(kept)
        for index, sums in crew.map(_write, todo, moved):
            checksums[opened.sink.files[index].name] = sums
        seconds = time.perf_counter() - begin
        _clear_small_files(out, sizes)
        opened.sink.conclude(out, checksums)
        _sync_tree(out, sizes)
        rounded = {}
        if verify:
            new = get_format(job.target_format).open_source(out)
            for pair, result in crew.map(_compare, _pairs(opened, new), lambda count: None):
                if result[0]:
                    rounded[pair] = result
        _commit(out, job.target)
        shutil.rmtree(work, ignore_errors=True)
    return Report(about, len(kept), seconds, verify, rounded)


# --- opening ------------------------------------------------------------------------------


def _open(job: Job) -> _Opened:
    source_format, path = detect(job.source, job.source_format)
    source = source_format.open_source(path)
    meta = CheckpointMeta(
        catalog=source.catalog,
        slots=source.slots,
        layout=job.layout or source.layout,
        config=source.config if job.config is None else job.config,
        fingerprints=source.fingerprints if job.fingerprints is None else job.fingerprints,
        run_state=source.run_state or job.run_state,
    )
    if job.config is not None:
        told = dataclasses.replace(meta, config=source.config, run_state=source.run_state)
        meta = dataclasses.replace(meta, catalog=catalog_for(meta, told))
    job = dataclasses.replace(job, source=path.resolve(), source_format=source_format.name)
    digest = _digest(job, source)
    request = Request(
        meta=meta,
        step=source.step,
        dtypes={
            (tensor.name, slot.name): source.dtype(tensor.name, slot.name)
            for tensor in source.catalog
            for slot in source.slots
        },
        dtype=job.dtype,
        nonce=digest,
        tokenizer=job.tokenizer,
        file_bytes=job.file_bytes,
    )
    sink = get_format(job.target_format).open_sink(request)
    return _Opened(job, source, sink, digest)


def _digest(job: Job, source: Source) -> str:
    """Equal for two commands exactly where one may go on with the other's work."""
    files = []
    for name, size in source.files.items():
        with naming(source.path / name, "cannot be examined", READING):
            files.append((name, size, os.stat(source.path / name).st_mtime_ns))
    text = json.dumps(
        [
            megagrow.__version__,
            {key: str(value) for key, value in sorted(vars(job).items()) if key != "target"},
            source.step,
            source.catalog.fingerprint(),
            files,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _survey(opened: _Opened, workers: int | None, buffer_bytes: int) -> Survey:
    if buffer_bytes < LEAST_BUFFER_BYTES:
        raise CheckpointError(
            "the buffer is too small",
            found=f"{buffer_bytes:,} bytes",
            expected=f"at least {LEAST_BUFFER_BYTES:,} bytes",
        )
    job, source, sink = opened.job, opened.source, opened.sink
    total = sum(plan.bytes for plan in sink.files)
    if workers is None:
        workers = min(os.cpu_count() or 1, 8) if total >= _WORTH_A_WORKER else 1
    workers = max(1, min(workers, len(sink.files)))
    place = job.target.resolve().parent
    while not place.exists():
        place = place.parent
    with naming(place, "cannot be examined"):
        status = os.statvfs(place)
    have, hold = [s.name for s in source.slots], [s.name for s in sink.slots]
    return Survey(
        source_format=str(job.source_format),
        source=source.path,
        files=len(sink.files),
        bytes=total,
        disk_bytes=total,
        # Some network file systems state no size at all; there the writes themselves will tell.
        free_bytes=status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62,
        memory_bytes=workers * (buffer_bytes + _SOURCE_BYTES),
        workers=workers,
        left_out=tuple(name for name in have if name not in hold),
        made=tuple(name for name in hold if name not in have),
    )


# --- the directory of the work ------------------------------------------------------------


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target}: something lies there already, and nothing is overwritten",
            mend=f"give another --to, or move it away: mv {target} {target}.old",
        )


@contextlib.contextmanager
def _working_in(work: Path) -> Iterator[None]:
    """Make the directory of the work and hold it; two processes must not share it."""
    with naming(work, "cannot be made"):
        (work / "out").mkdir(parents=True, exist_ok=True)
        (work / "done").mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{work}: the same conversion is running",
                mend="wait for it, or end it and run this command again: it goes on",
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _finished(sink: Sink, out: Path, done: Path) -> dict[str, list[str]]:
    """The files that are whole, with their checksums; compared, not believed."""
    finished = {}
    for index, plan in enumerate(sink.files):
        sums = _recorded(done / f"{index}.json")
        path = out / plan.name
        if sums is not None and path.is_file() and _sums(path, plan.bytes) == sums:
            finished[plan.name] = sums
    return finished


def _recorded(path: Path) -> list[str] | None:
    try:
        sums = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return sums if isinstance(sums, list) else None


def _sums(path: Path, size: int) -> list[str] | None:
    with open_regular(path) as (descriptor, found), naming(path, "cannot be read", READING):
        if found != size:
            return None
        sums, buffer = [], memoryview(bytearray(min(size, CHUNK_BYTES)))
        for start in range(0, size, CHUNK_BYTES):
            data = buffer[: min(CHUNK_BYTES, size - start)]
            if not read_exactly(descriptor, data, start):
                return None
            sums.append(checksum(data))
        return sums


def _clear_small_files(out: Path, sizes: Mapping[str, int]) -> None:
    """Delete what `conclude` left when it was killed."""
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(out).as_posix() not in sizes:
            path.unlink()


def _sync_tree(out: Path, sizes: Mapping[str, int]) -> None:
    for path in (*out.rglob("*"), out):
        with naming(path, "cannot be synchronised"):
            if path.is_dir():
                sync_directory(path)
            elif path.relative_to(out).as_posix() not in sizes:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _commit(out: Path, target: Path) -> None:
    _refuse_existing(target)
    with naming(target, "cannot be committed"):
        os.rename(out, target)
        sync_directory(target.parent)


# --- the work -----------------------------------------------------------------------------


@dataclass
class _Site:
    """What a worker has at hand."""

    opened: _Opened
    work: Path
    buffer_bytes: int
    moved: Callable[[int], None]

    @cached_property
    def result(self) -> Source:
        """What was made, open for reading."""
        return get_format(self.opened.job.target_format).open_source(self.work / "out")


def _write(site: _Site, index: int) -> list[str]:
    plan: FilePlan = site.opened.sink.files[index]
    path = site.work / "out" / plan.name
    with naming(path.parent, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    sums = write_file(
        path, plan, site.opened.source, buffer_bytes=site.buffer_bytes, moved=site.moved
    )
    record = site.work / "done" / f"{index}.json"
    with naming(record, "cannot be written"):
        descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, memoryview(json.dumps(sums).encode()))
        finally:
            os.close(descriptor)
    return sums


def _pairs(opened: _Opened, new: Source) -> list[tuple[str, str]]:
    """All (tensor, slot) of the result, once it is seen to have the tensors that it should."""
    wanted = {tensor.name: tensor.shape for tensor in opened.source.catalog}
    found = {tensor.name: tensor.shape for tensor in new.catalog}
    slots = [slot.name for slot in new.slots]
    if wanted != found or set(slots) != {slot.name for slot in opened.sink.slots}:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[:4]
        raise CheckpointError(f"{new.path}: not what was converted", found=odd or slots)
    return [(name, slot) for name in found for slot in slots]


def _compare(site: _Site, pair: tuple[str, str]) -> tuple[int, float]:
    return compare(site.opened.source, site.result, *pair, buffer_bytes=site.buffer_bytes)


class _Crew:
    """The workers: this process, or several others."""

    def __init__(self, opened: _Opened, work: Path, workers: int, buffer_bytes: int) -> None:
        self._opened, self._work = opened, work
        self._workers, self._buffer_bytes = workers, buffer_bytes

    def map(
        self, task: Callable[[_Site, Any], Any], items: Sequence[Any], moved: Callable[[int], None]
    ) -> Iterable[tuple[Any, Any]]:
        """(item, result) of each item, in any order; the first error ends the work."""
        if self._workers == 1 or len(items) < 2:
            site = _Site(self._opened, self._work, self._buffer_bytes, moved)
            for item in items:
                yield item, task(site, item)
            return
        # A forked process would inherit the locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        count = context.Value("q", 0)
        told = 0
        arguments = (self._opened.job, self._work, self._buffer_bytes, count)
        with ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_start_worker, initargs=arguments
        ) as pool:
            waiting: dict[Future[Any], Any] = {
                pool.submit(_in_worker, task, item): item for item in items
            }
            try:
                while waiting:
                    ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    moved(count.value - told)
                    told = count.value
                    for future in ready:
                        item = waiting.pop(future)
                        yield item, future.result()
            except BrokenProcessPool:
                raise CheckpointError(
                    f"{self._work}: a worker process died",
                    found="perhaps it was killed, or there was not enough memory",
                    mend="run the command again, with --workers 1 if memory is short: it goes on",
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


_SITE: list[_Site] = []  # of this worker process


def _start_worker(job: Job, work: Path, buffer_bytes: int, count: Any) -> None:
    torch.set_num_threads(1)

    def moved(more: int) -> None:
        with count.get_lock():
            count.value += more

    try:
        opened = _open(job)
    except MegagrowError:
        return  # the first task tells
    _SITE.append(_Site(opened, work, buffer_bytes, moved))


def _in_worker(task: Callable[[_Site, Any], Any], item: Any) -> Any:
    if not _SITE:
        raise CheckpointError("a worker cannot open the source, which has changed meanwhile")
    return task(_SITE[0], item)
