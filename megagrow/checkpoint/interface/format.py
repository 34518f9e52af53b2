"""The interface of a checkpoint format: one adapter for reading and writing.

A *source* is an open checkpoint of the format, which can read any box of any logical tensor.
A *sink* is a checkpoint to be written: its files as data.  Each file is a list of segments,
most of them a box of a slot of a logical tensor, so that only the converter reads, converts element
types, writes, checksums and commits, in bounded memory, for every format.  Files are
independent of each other and written in any order, by several threads, possibly before and after
an interruption; so a sink must be a function of its request alone.

A new format is a module with a `FORMAT`, registered in `convert.registry`.  A format whose files
hold boxes as contiguous ranges of bytes (as all known ones do) only needs to list them: see
`stored_source.StoredSource`.  For torch.save archives see `torch_reader`.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.tokenizer_files import OwnTokenizer
from megagrow.errors import ConfigError
from megagrow.state.boxes import Box, flat_range_boxes
from megagrow.state.catalog import Catalog, Slot
from megagrow.state.layout import Layout

# --- reading ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that a source holds and no reader of ours carries over.

    Every name in a source is carried, derived from what is carried, or listed here; every command
    that opens the source prints the list.

    Attributes:
        name: the source's own name of a tensor, buffer, slot, argument or setting.
        reason: why it is left out, worded to fit "left out: NAME (REASON)".
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user supplies to a reader because the files do not say it.

    Attributes:
        vocabulary: number of tokens, if the files give only the padded number of table rows.
        ignore: names, as in an error or `left_out`, of settings that do not affect what the model
            computes, or of copies that may differ.
        family: the family of the model, if the files fit several.
    """

    vocabulary: int | None = None
    ignore: tuple[str, ...] = ()
    family: str | None = None

    @property
    def given(self) -> frozenset[str]:
        """The command-line names of those that are supplied."""
        told = {"vocab-size": self.vocabulary, "ignore": self.ignore, "family": self.family}
        return frozenset(name for name, value in told.items() if value)


NO_OPTIONS = ReadOptions()


class CheckpointSource(Protocol):
    """A checkpoint open for reading by any number of threads; `NativeCheckpoint` is one.

    Whatever a format does not store is empty, 0 or a layout of one rank.  `model_of.model_of`
    derives the model from the configuration, the growths in it and the run state.
    """

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""

    @property
    def catalog(self) -> Catalog:
        """The logical tensors."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of each tensor."""

    @property
    def layout(self) -> Layout:
        """The layout of the run that wrote it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run."""

    @property
    def run_state(self) -> Mapping[str, Any]:
        """The training loop's state for resuming."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of what must be unchanged when the run resumes."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each file with values, by its path relative to `path`."""

    @property
    def bytes(self) -> int:
        """Total size of these files."""

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What its files hold and this source does not provide."""

    @property
    def zeros(self) -> Collection[tuple[str, str]]:
        """(tensor, slot) that its files lack though other tensors have the slot: read as zeros."""

    @property
    def checksums(self) -> int:
        """Number of checksums that the format has for its values."""

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether a tensor has the slot."""

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot (CheckpointError if the tensor lacks the slot)."""

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """Which files hold a box: (index of the file, common box)."""

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, in memory bounded by the box and a constant (CheckpointError)."""

    def verify(self) -> None:
        """Check every checksum that the format has (CheckpointError)."""


# --- writing ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Values:
    """Elements of a box, row-major; with `axes`, in the row-major order of the permuted box.

    `axes` is a permutation as in `torch.Tensor.permute`.  A slot that the source lacks is written
    as zeros.
    """

    tensor: str
    slot: str
    box: Box
    dtype: torch.dtype
    axes: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.box.volume * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Zeros:
    """Padding: this many zero bytes."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The start of a record whose CRC-32 a later `Late` needs; takes no bytes in the file."""


@dataclass(frozen=True, slots=True)
class Late:
    """Bytes that depend on the values before them; `make` must return exactly `bytes` bytes.

    `make` receives the CRC-32 of every record so far.  A record extends from its `Mark` to the next
    `Mark` or `Late`.
    """

    bytes: int
    make: Callable[[Sequence[int]], builtins.bytes]


Segment = bytes | Values | Zeros | Mark | Late


def segment_bytes(segment: Segment) -> int:
    """Size of a segment in the file."""
    if isinstance(segment, Mark):
        return 0
    return len(segment) if isinstance(segment, bytes) else segment.bytes


@dataclass(frozen=True)
class FilePlan:
    """A file to be written; `name` is its path relative to the checkpoint's directory, with "/"."""

    name: str
    segments: Sequence[Segment]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(map(segment_bytes, self.segments))


@dataclass(frozen=True)
class FilePiece:
    """A part of a planned file that one worker writes: the whole file, or whole chunks of it.

    Attributes:
        start: offset of its first byte in the file of `file_bytes` bytes.
    """

    name: str
    segments: Sequence[Segment]
    start: int
    bytes: int
    file_bytes: int


def cut(plan: FilePlan, limit: int) -> list[FilePiece]:
    """Split a planned file into pieces of `limit` bytes; not if later bytes depend on earlier ones.

    Args:
        limit: a multiple of the chunk size.
    """
    total = plan.bytes
    whole_file = FilePiece(plan.name, plan.segments, 0, total, total)
    if total <= limit or any(isinstance(s, (Mark, Late)) for s in plan.segments):
        return [whole_file]
    pieces: list[list[Segment]] = [[]]
    position = 0
    for segment in plan.segments:
        done, size = 0, segment_bytes(segment)
        while done < size:
            if position == limit * len(pieces):
                pieces.append([])
            taken = min(size - done, limit * len(pieces) - position)
            if isinstance(segment, Values) and (done or taken < size):
                if done % segment.dtype.itemsize or taken % segment.dtype.itemsize:
                    return [whole_file]
                pieces[-1] += _part(segment, done, taken)
            elif isinstance(segment, bytes):
                pieces[-1].append(segment[done : done + taken])
            else:
                pieces[-1].append(Zeros(taken) if isinstance(segment, Zeros) else segment)
            done, position = done + taken, position + taken
    sizes = [sum(map(segment_bytes, piece)) for piece in pieces]
    return [
        FilePiece(plan.name, piece, limit * i, sizes[i], total) for i, piece in enumerate(pieces)
    ]


def _part(values: Values, first: int, count: int) -> Iterator[Values]:
    """Bytes [first, first + count) of values, as boxes."""
    width = values.dtype.itemsize
    axes = values.axes or tuple(range(len(values.box.shape)))
    shape = [values.box.shape[axis] for axis in axes]
    for box, _ in flat_range_boxes(shape, first // width, (first + count) // width):
        offset, length = [0] * len(axes), [0] * len(axes)
        for place, axis in enumerate(axes):
            offset[axis], length[axis] = box.offset[place], box.shape[place]
        inner = Box(tuple(offset), tuple(length)).moved_by(values.box.offset)
        yield dataclasses.replace(values, box=inner)


@dataclass(frozen=True)
class SinkRequest:
    """The input of a sink.

    Attributes:
        meta: of the state to convert; `meta.slots` are the source's, `meta.layout` is the requested
            layout.
        step: number of optimizer steps done.
        dtypes: element type of each (tensor, slot) of the source.
        dtype: the requested element type, or None: the one that the format requires, else the
            source's.
        nonce: 16 hexadecimal digits, for formats that identify the save in each file.
        tokenizer: the tokenizer to include, if the format holds one; or why there is none.
        file_bytes: maximum size of a file, for formats that split by size.
        card: the source's model card, if it has one.
        changed: whether the model is another than the source's, such as a grown one.
    """

    meta: CheckpointMeta
    step: int
    dtypes: Mapping[tuple[str, str], torch.dtype]
    dtype: torch.dtype | None = None
    nonce: str = "0" * 16
    tokenizer: OwnTokenizer | str | None = None
    file_bytes: int = 5 << 30
    card: bytes | None = None
    changed: bool = False

    def dtype_of(self, tensor: str, slot: str) -> torch.dtype:
        """The requested or stored element type; fp32 for a slot that the source lacks.

        Integers and booleans keep their type.
        """
        stored = self.dtypes.get((tensor, slot), torch.float32)
        return self.dtype if self.dtype and stored.is_floating_point else stored


class Sink(Protocol):
    """A checkpoint to be written.

    A sink that cannot express a setting of the model says so in an attribute `left_out`.
    """

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that the format stores of this state."""

    @property
    def files(self) -> Sequence[FilePlan]:
        """The files with values (and other large files)."""

    def conclude(
        self, directory: Path, checksums: Mapping[str, Sequence[str]]
    ) -> Sequence[str] | None:
        """Add the small files (manifest, index, configuration) after all others have been written.

        Args:
            directory: where all files are, not yet the checkpoint's final path; the caller syncs
                names and files to disk.
            checksums: by file name, the CRC-32 of each chunk of `CHUNK_BYTES`, as 8 hexadecimal
                digits.

        Returns:
            Lines for the user to read, if there are any.
        """


# --- a format -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: its name on the command line.
        find: the checkpoint of this format that a path refers to (itself, or one inside it, for
            instance the newest), or None.  Looks at names, and reads as little as possible.
        open_source: open what `find` returned (CheckpointError).
        open_sink: plan a checkpoint (CheckpointError, ConfigError if the state does not fit).
        sealed: whether its own files checksum every byte, so that no sidecar is needed.
        open_with: `open_source` for a format that takes `ReadOptions`.
        told: the command-line names of those that it takes.
        options: the options that a conversion into it accepts, by command-line name.
    """

    name: str
    find: Callable[[Path], Path | None]
    open_source: Callable[[Path], CheckpointSource]
    open_sink: Callable[[SinkRequest], Sink]
    sealed: bool = False
    options: frozenset[str] = frozenset({"tensor", "pipeline", "data", "zero"})
    open_with: Callable[[Path, ReadOptions], CheckpointSource] | None = None
    told: frozenset[str] = frozenset()

    def open(self, path: Path, options: ReadOptions) -> CheckpointSource:
        """Open what `find` returned (CheckpointError; ConfigError for unsupported options)."""
        unused = ", ".join(f"--{name}" for name in sorted(options.given - self.told))
        if unused:
            raise ConfigError(
                f"format {self.name} does not use {unused}", fix=f"leave out {unused}"
            )
        return self.open_with(path, options) if self.open_with else self.open_source(path)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of a layout that its files can express; ZeRO goes with `data`."""
        return tuple(axis for axis in ("data", "tensor", "pipeline") if axis in self.options)
