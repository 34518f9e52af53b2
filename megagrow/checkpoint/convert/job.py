"""Define a conversion and survey it: open the source, plan the target."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import megagrow
from megagrow.checkpoint.convert.registry import detect, get_format
from megagrow.checkpoint.interface.accounting import made_zeros
from megagrow.checkpoint.interface.file_writer import LEAST_BUFFER_BYTES
from megagrow.checkpoint.interface.format import (
    NO_OPTIONS,
    CheckpointSource,
    FilePiece,
    LeftOut,
    ReadOptions,
    Sink,
    SinkRequest,
    cut,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import catalog_for, optimizer_of
from megagrow.checkpoint.interface.own_tokenizer import own_tokenizer, require_own_tokenizer
from megagrow.checkpoint.interface.tokenizer_files import OwnTokenizer
from megagrow.checkpoint.io.checksum import CHUNK_BYTES
from megagrow.checkpoint.io.files import READING, naming, read_small
from megagrow.errors import CheckpointError, ConfigError
from megagrow.state.catalog import slots_of
from megagrow.state.layout import Layout

BUFFER_BYTES = 64 << 20
PIECE_BYTES = 16 * CHUNK_BYTES  # one worker's unit of work, for files that can be split
_SOURCE_BYTES = CHUNK_BYTES  # largest buffer of a source, per worker
_MOST_WORKERS = 8
_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Job:
    """What to convert, and into what.

    Attributes:
        source, source_format: the checkpoint to read; its format is detected if None.
        target, target_format: the checkpoint to write; `target` must not exist.
        layout: the target's; the source's if None.
        dtype: element type of all values, or None: the one that the format requires, else the
            source's.
        tokenizer: a file or a directory to include, or `none`; by default the model's own, if it
            is found.  Ignored for formats that hold no tokenizer.
        allow_other_tokenizer: whether it, or that of `config`, may differ from the model's.
        file_bytes: maximum size of a file, for formats that split by size.
        run_state: the run state to use where the source has none or only a part of it.
        read_options: what the user supplies because the source's files do not say it.
        config, fingerprints: of a run that is to start from the result; replace the source's.
        transform: applied to the source, such as a growth; transforms that differ must differ
            in `str`.
    """

    source: Path
    target: Path
    target_format: str
    source_format: str | None = None
    layout: Layout | None = None
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    allow_other_tokenizer: bool = False
    file_bytes: int = 5 << 30
    run_state: Mapping[str, Any] = field(default_factory=dict)
    read_options: ReadOptions = NO_OPTIONS
    config: Mapping[str, Any] | None = None
    fingerprints: Mapping[str, str] | None = None
    transform: Callable[[CheckpointSource], CheckpointSource] | None = None


@dataclass(frozen=True)
class Survey:
    """What a conversion needs and what it leaves out.

    Attributes:
        source_format: as given or detected.
        bytes: total size of the files with values.
        disk_bytes: space needed at the target: at most the size of the target itself.
        free_bytes: space available there now.
        memory_bytes: maximum memory for values, all workers together.
        workers: number of threads.
        left_out: what the source holds and the result does not.
        made: slots of the target that the source lacks, for some tensors or for all: zeros.
    """

    source_format: str
    source: Path
    files: int
    bytes: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    workers: int
    left_out: tuple[LeftOut, ...]
    made: tuple[str, ...]


Origin = Literal["source", "given", "neither"]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        kept: number of files already finished by an interrupted run.
        seconds: for reading and writing, without verification.
        rounded: if verified, for each (tensor, slot) whose element type changed: number of
            values that differ, and the greatest difference relative to the greatest value.
        described: if verified, for each item of metadata (step, configuration, ...) whose it is
            in the result: the source's, given by --config, or neither.
        notes: from the format, for the user.
    """

    survey: Survey
    kept: int
    seconds: float
    verified: bool
    rounded: Mapping[tuple[str, str], tuple[int, float]]
    described: Mapping[str, Origin]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Opened:
    """A job with its source open and its target planned.

    Attributes:
        meta: the metadata of the result.
        pieces: the target's files in pieces of at most `PIECE_BYTES`, or whole.
        digest: equal for two jobs exactly if one may resume the other's work.
    """

    job: Job
    source: CheckpointSource
    sink: Sink
    meta: CheckpointMeta
    pieces: tuple[FilePiece, ...]
    digest: str


def open_job(job: Job) -> Opened:
    """Open the source and plan the target.

    Raises:
        MegagrowError: the source is damaged or cannot be expressed in the target's format.
    """
    _require_axes(job)
    source_format, path = detect(job.source, job.source_format)
    source = source_format.open(path, job.read_options)
    if job.transform is not None:
        source = job.transform(source)
    meta = CheckpointMeta(
        catalog=source.catalog,
        slots=source.slots,
        layout=job.layout or source.layout,
        config=source.config if job.config is None else job.config,
        fingerprints=source.fingerprints if job.fingerprints is None else job.fingerprints,
        run_state=_run_state(source, job),
    )
    target_format = get_format(job.target_format)
    tokenizer: OwnTokenizer | str | None = None
    if "tokenizer" in target_format.options:
        other = job.allow_other_tokenizer
        tokenizer = own_tokenizer(source, job.tokenizer, allow_other=other)
    if job.fingerprints is not None and not job.allow_other_tokenizer:
        require_own_tokenizer(source, job.fingerprints)
    if job.config is not None:
        described = dataclasses.replace(meta, config=source.config, run_state=source.run_state)
        try:
            meta = dataclasses.replace(meta, catalog=catalog_for(meta, described))
        except CheckpointError as error:
            if job.transform is None:
                raise
            raise error.or_fix(
                "describe in --config the model as it is after the growth, and no growth at step 0"
            ) from None
    job = dataclasses.replace(job, source=path.resolve(), source_format=source_format.name)
    digest = _digest(job, source)
    request = SinkRequest(
        meta=meta,
        step=source.step,
        dtypes={
            (tensor.name, slot.name): source.dtype(tensor.name, slot.name)
            for tensor in source.catalog
            for slot in slots_of(tensor, source.slots)
        },
        dtype=job.dtype,
        nonce=digest,
        tokenizer=tokenizer,
        file_bytes=job.file_bytes,
        card=_card(path),
        changed=job.transform is not None,
    )
    sink = target_format.open_sink(request)
    _require_whole_slots(source, sink, job)
    pieces = tuple(piece for plan in sink.files for piece in cut(plan, PIECE_BYTES))
    return Opened(job, source, sink, meta, pieces, digest)


def _card(path: Path) -> bytes | None:
    """The model card beside a source's weights."""
    found = path / "README.md"
    return read_small(found, _CARD_BYTES) if found.is_file() else None


def _run_state(source: CheckpointSource, job: Job) -> dict[str, Any]:
    """The source's run state, completed by the job's: foreign sources have only a part of it."""
    if not source.run_state:
        return dict(job.run_state)
    rest = {**job.run_state, "step": source.step} if job.run_state else {}
    return {**rest, **source.run_state}


def _require_axes(job: Job) -> None:
    """Reject a requested layout that the format cannot store, instead of dropping it silently."""
    target = get_format(job.target_format)
    layout = job.layout or Layout()
    asked = {axis: getattr(layout, axis) for axis in ("tensor", "pipeline", "data")}
    lost = {axis: n for axis, n in asked.items() if n > 1 and axis not in target.axes}
    if layout.zero and "data" not in target.axes:
        lost["zero"] = layout.zero
    if lost:
        found = " ".join(f"--{axis} {n}" for axis, n in lost.items())
        raise ConfigError(
            f"format {target.name} cannot express a layout's {', '.join(lost)}",
            found=found,
            expected=f"{' and '.join(target.axes) or 'no layout'}",
            fix=f"leave out {found}: the result is the same for any",
        )


def _require_whole_slots(source: CheckpointSource, sink: Sink, job: Job) -> None:
    """Refuse a slot that only some tensors have for a format that wants it of all.

    So Muon state is not exported as Adam's: zero second moments would make a run diverge.
    """
    partial = {slot.name for slot in source.slots if not slot.matrices}
    if any(slot.matrices and slot.name in partial for slot in sink.slots):
        raise CheckpointError(
            f"{source.path}: its matrices have no {', '.join(sorted(partial))} (optimizer "
            f"{optimizer_of(source).name}), which format {job.target_format} wants of every tensor",
            fix="convert to native, to dcp, or to huggingface (weights alone)",
        )


def _digest(job: Job, source: CheckpointSource) -> str:
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


def survey_of(opened: Opened, workers: int | None, buffer_bytes: int) -> Survey:
    """What the conversion needs and what it leaves out."""
    if buffer_bytes < LEAST_BUFFER_BYTES:
        raise CheckpointError(
            "the buffer is too small",
            found=f"{buffer_bytes:,} bytes",
            expected=f"at least {LEAST_BUFFER_BYTES:,} bytes",
        )
    job, source, sink = opened.job, opened.source, opened.sink
    total = sum(plan.bytes for plan in sink.files)
    if workers is None:
        # One more than the cores, since some wait for the disk.
        workers = min((os.cpu_count() or 1) + 1, _MOST_WORKERS)
    workers = max(1, min(workers, len(opened.pieces)))
    place = job.target.resolve().parent
    while not place.exists():
        place = place.parent
    with naming(place, "cannot be examined"):
        status = os.statvfs(place)
    hold = [slot.name for slot in sink.slots]
    no_place = f"no place in format {job.target_format}"
    return Survey(
        source_format=str(job.source_format),
        source=source.path,
        files=len(sink.files),
        bytes=total,
        disk_bytes=total,
        # Some network file systems report no size; there the writes themselves will fail if full.
        free_bytes=status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62,
        memory_bytes=workers * (buffer_bytes + _SOURCE_BYTES),
        workers=workers,
        left_out=(
            *source.left_out,
            *getattr(sink, "left_out", ()),
            *(LeftOut(slot.name, no_place) for slot in source.slots if slot.name not in hold),
        ),
        made=made_zeros(source, hold),
    )
