"""What a checkpoint format is to the converter: one adapter with two faces.

A *source* is a checkpoint of the format, open for reading by any box of any logical tensor.
A *sink* is a checkpoint that is to be: its files as data.  Each file is a list of segments,
most of them a box of a slot of a logical tensor, so the converter alone reads, converts element
types, writes, sums up and commits, in bounded memory, whatever the formats are.  Files are
independent of each other and written in any order, by several threads, perhaps on either side
of a kill; so a sink must be a function of its request alone.

A new format is a module with a `FORMAT`, entered in `formats`.  A format whose files hold boxes
as contiguous stretches of bytes (all that we know) needs only their list to be a source: see
`stored.StoredSource`.  Archives as torch.save writes them: see `torchfile`.
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

# --- the face that is read ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that a source holds and no reader of ours carries over.

    Every name in a source is carried, derived from what is carried, or listed here; what is
    listed is printed by every command that opens the source.

    Attributes:
        name: as the source has it: a tensor, buffer, slot, argument or setting.
        reason: why it is left out, in words that end a sentence "left out: NAME (REASON)".
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a person tells a reader that the files do not.

    Attributes:
        vocabulary: number of tokens, where the files tell only the table's rows with padding.
        ignore: names, as an error or `left_out` has them, of settings that change nothing of
            what the model computes, or of copies that need not be alike.
    """

    vocabulary: int | None = None
    ignore: tuple[str, ...] = ()


NOTHING_TOLD = ReadOptions()


class Source(Protocol):
    """A checkpoint open for reading by any number of threads; `NativeCheckpoint` is one.

    What a format does not tell is empty, 0 or a layout of one rank.  Which model it is of,
    `shape.model_of` tells, from the configuration, the growths in it and the run's state.
    """

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def catalog(self) -> Catalog:
        """The logical tensors."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What is kept of each tensor."""

    @property
    def layout(self) -> Layout:
        """The layout of the run that wrote it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run."""

    @property
    def run_state(self) -> Mapping[str, Any]:
        """What the training loop needs to go on."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of what the run must find again unchanged."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each file of values, by its path below `path`."""

    @property
    def bytes(self) -> int:
        """Size of all of them together."""

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What its files hold and this source does not offer."""

    @property
    def zeros(self) -> Collection[tuple[str, str]]:
        """(tensor, slot) that its files lack though other tensors have the slot: zeros."""

    @property
    def checksums(self) -> int:
        """Number of checksums that the format has of its values."""

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether a tensor has the slot."""

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot (CheckpointError where it has none)."""

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """Which files hold a box: (index of the file, common box)."""

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, in memory bounded by the box and a constant (CheckpointError)."""

    def verify(self) -> None:
        """Compare every checksum that the format has (CheckpointError)."""


# --- the face that is written -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Values:
    """Elements of a box, row-major; with `axes`, in the row-major order of the permuted box.

    `axes` is the permutation, as `torch.Tensor.permute` takes it.  A slot of the sink that the
    source does not have is zeros.
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
    """Padding: so many bytes that are 0."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The start of a record, whose CRC-32 a later `Late` wants; no byte of the file."""


@dataclass(frozen=True, slots=True)
class Late:
    """Bytes that depend on the values before them: `make` must return `bytes` of them.

    `make` is given the CRC-32 of every record so far.  A record goes from its `Mark` to the next
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
    """A file to be; `name` is its path below the checkpoint's directory, with "/"."""

    name: str
    segments: Sequence[Segment]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(map(segment_bytes, self.segments))


@dataclass(frozen=True)
class FilePiece:
    """A stretch of a file to be that one worker writes: the whole file, or whole chunks of it.

    Attributes:
        start: its first byte in the file, of `file_bytes` in all.
    """

    name: str
    segments: Sequence[Segment]
    start: int
    bytes: int
    file_bytes: int


def cut(plan: FilePlan, limit: int) -> list[FilePiece]:
    """Cut a file to be into pieces of `limit` bytes; whole where later bytes depend on earlier.

    Args:
        limit: a multiple of the chunks' size.
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
class Request:
    """What a sink is asked for.

    Attributes:
        meta: of the state that is converted; `meta.slots` are the source's, `meta.layout` is the
            layout that is asked for.
        step: optimizer steps done.
        dtypes: element type of each (tensor, slot) of the source.
        dtype: the element type asked for, or None: what the format demands, else the source's.
        nonce: 16 hexadecimal digits, for a format that marks its files with a save's identity.
        tokenizer: to carry along, where the format holds one; or why there is none.
        file_bytes: greatest size of a file, for formats that cut by size.
    """

    meta: CheckpointMeta
    step: int
    dtypes: Mapping[tuple[str, str], torch.dtype]
    dtype: torch.dtype | None = None
    nonce: str = "0" * 16
    tokenizer: OwnTokenizer | str | None = None
    file_bytes: int = 5 << 30

    def dtype_of(self, tensor: str, slot: str) -> torch.dtype:
        """What is asked for or stored; fp32 for a slot that the source does not have.

        Whole numbers and truth values stay what they are.
        """
        stored = self.dtypes.get((tensor, slot), torch.float32)
        return self.dtype if self.dtype and stored.is_floating_point else stored


class Sink(Protocol):
    """A checkpoint that is to be.

    One that has no place for a setting of the model says so in an attribute `left_out`.
    """

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that the format holds of this state."""

    @property
    def files(self) -> Sequence[FilePlan]:
        """The files with values (and others that are large)."""

    def conclude(
        self, directory: Path, checksums: Mapping[str, Sequence[str]]
    ) -> Sequence[str] | None:
        """Add the small files (manifest, index, configuration), once all others are written.

        Args:
            directory: where all files are, which is not yet the checkpoint's final place; names
                and files are pushed to the disk by the caller.
            checksums: by file name, the CRC-32 of each chunk of `shards.CHUNK_BYTES`, 8
                hexadecimal digits.

        Returns:
            Lines that a person should read, if there are any.
        """


# --- a format -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: as the command line knows it.
        find: the checkpoint of this format that a path means (itself, or one inside it, for
            instance the newest), or None.  Looks at names, and at no more of a file than it must.
        open_source: open what `find` returned (CheckpointError).
        open_sink: plan a checkpoint (CheckpointError, ConfigError where the state does not fit).
        sealed: whether its own files have checksums of all bytes, so that none need lie beside.
        open_told: `open_source` for a format that takes `ReadOptions`.
        options: what a conversion into it may be told, by the names of the command line.
    """

    name: str
    find: Callable[[Path], Path | None]
    open_source: Callable[[Path], Source]
    open_sink: Callable[[Request], Sink]
    sealed: bool = False
    options: frozenset[str] = frozenset({"tensor", "pipeline", "data", "zero"})
    open_told: Callable[[Path, ReadOptions], Source] | None = None

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open what `find` returned (CheckpointError; ConfigError for options without a use)."""
        if options == NOTHING_TOLD:
            return self.open_source(path)
        if self.open_told is None:
            raise ConfigError(
                f"format {self.name} tells everything itself",
                fix="leave out --vocab-size and --ignore",
            )
        return self.open_told(path, options)

    @property
    def axes(self) -> tuple[str, ...]:
        """Of a layout, those that its files have a place for; ZeRO goes with `data`."""
        return tuple(axis for axis in ("data", "tensor", "pipeline") if axis in self.options)
