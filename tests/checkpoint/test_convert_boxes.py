"""Any box of any tensor, with any order of axes and any cut, through a file and back."""

import itertools
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.interface import stored_source
from megagrow.checkpoint.interface.format import FilePlan, Late, Mark, Values, Zeros
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.io.checksum import CHUNK_BYTES
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, flat_range_boxes, whole
from megagrow.state.catalog import MASTER, Catalog
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import write_file
from tests.checkpoint.worlds import logical


def about(shape):
    return CheckpointMeta(Catalog((logical("t", *shape),)), (MASTER,), Layout(), {}, {}, {})


def source_of(path, pieces, shape, *, records=()):
    """A source with one file that holds pieces: (box, axes, values), one after the other."""
    data, boxes = b"", []
    for box, axes, values in pieces:
        turned = values.permute(axes) if axes else values
        boxes.append(StoredBox("t", "master", box, "f", len(data), values.dtype, axes))
        data += turned.numpy().tobytes()
    (path / "f").write_bytes(data)
    sizes = {"f": len(data)}
    return StoredSource(path, meta=about(shape), step=0, sizes=sizes, boxes=boxes, records=records)


@st.composite
def worlds(draw):
    """Shape, pieces that tile it (each with an order of axes) and a box to read."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    numel = math.prod(shape)
    cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=3))})
    boxes = [b for low, high in itertools.pairwise(cuts)
             for b, _ in flat_range_boxes(shape, low, high)]  # fmt: skip
    orders = [draw(st.none() | st.permutations(range(len(shape))).map(tuple)) for _ in boxes]
    start = [draw(st.integers(0, n - 1)) for n in shape]
    length = [draw(st.integers(1, n - o)) for n, o in zip(shape, start, strict=True)]
    axes = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    wide = draw(st.booleans())
    return (
        shape,
        list(zip(boxes, orders, strict=True)),
        Box(tuple(start), tuple(length)),
        axes,
        wide,
    )


@pytest.fixture(scope="module", name="room")
def one_room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


@settings(max_examples=150, deadline=None)
@given(
    world=worlds(),
    small=st.sampled_from([8, 24, 4 << 20]),
    run=st.sampled_from([1, 16, 1 << 16]),
    limit=st.sampled_from([8, 40, 1 << 20]),
)
def test_any_box_is_read_and_written(room, world, small, run, limit):
    shape, cuts, box, axes, wide = world
    values = torch.randn(shape, generator=torch.manual_seed(0))
    pieces = [(b, order, values[b.slices]) for b, order in cuts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_source, "_BUFFER_BYTES", small)
        patch.setattr(stored_source, "_RUN_BYTES", run)
        source = source_of(room, pieces, shape)
        assert torch.equal(source.read("t", "master", box), values[box.slices])
        dtype = torch.float64 if wide else torch.float32
        plan = FilePlan(
            "g", [b"12345"[: 5 if axes else 4], Values("t", "master", box, dtype, axes)]
        )
        write_file(room / "g", plan, source, limit=limit)
    data = (room / "g").read_bytes()
    assert len(data) == plan.bytes
    found = torch.frombuffer(bytearray(data[len(plan.segments[0]) :]), dtype=dtype)
    turned = values[box.slices].permute(axes) if axes else values[box.slices]
    assert torch.equal(found, turned.to(dtype).contiguous().view(-1))


def test_segments_checksums_and_late_bytes(tmp_path):
    values = torch.arange(40.0).view(5, 8)
    source = source_of(tmp_path, [(whole((5, 8)), None, values)], (5, 8))
    seen = []

    def late(crcs):
        seen.append(tuple(crcs))
        return b"late"

    item = Values("t", "master", whole((5, 8)), torch.float32)
    missing = Values("t", "exp_avg", whole((5, 8)), torch.float32)
    segments = [b"head", Mark(), item, Late(4, late), b"gap", Mark(), Zeros(70), Mark(), missing,
                Late(4, late)]  # fmt: skip
    plan = FilePlan("g", segments)
    # Records and chunks end at different places.
    sums = write_file(tmp_path / "g", plan, source, chunk_bytes=64)
    raw = values.numpy().tobytes()
    data = (tmp_path / "g").read_bytes()
    assert data == b"head" + raw + b"lategap" + bytes(70) + bytes(160) + b"late"
    assert seen == [
        (zlib.crc32(raw),),
        (zlib.crc32(raw), zlib.crc32(bytes(70)), zlib.crc32(bytes(160))),
    ]
    assert sums == [f"{zlib.crc32(data[i : i + 64]):08x}" for i in range(0, len(data), 64)]
    assert CHUNK_BYTES == 16 << 20


def test_boxes_that_do_not_tile_are_refused(tmp_path):
    values = torch.zeros(2, 3)
    top = (Box((0, 0), (1, 3)), None, values[:1])
    for pieces, fault in (
        ([top], "a piece is missing"),
        ([top, (whole((2, 3)), None, values)], "overlap"),
        ([top, (Box((1, 0), (2, 3)), None, values)], "outside"),
        ([top, (Box((1, 0), (1, 3)), None, values[1:].half())], "element types differ"),
    ):
        with pytest.raises(CheckpointError, match=fault):
            source_of(tmp_path, pieces, (2, 3))
    with pytest.raises(CheckpointError, match="outside its file"):
        StoredSource(
            tmp_path, meta=about((2, 3)), step=0, sizes={"f": 23},
            boxes=[StoredBox("t", "master", whole((2, 3)), "f", 0, torch.float32)],
        )  # fmt: skip


def test_a_record_is_compared_when_it_is_touched(tmp_path):
    values = torch.arange(6.0).view(2, 3)
    raw = values.numpy().tobytes()
    rows = [(Box((i, 0), (1, 3)), None, values[i : i + 1]) for i in range(2)]
    records = [Record("f", 0, 12, zlib.crc32(raw[:12])), Record("f", 12, 12, zlib.crc32(b"x"))]
    source = source_of(tmp_path, rows, (2, 3), records=records)
    assert torch.equal(source.read("t", "master", Box((0, 0), (1, 3))), values[:1])
    with pytest.raises(
        CheckpointError, match=r"f: tensor t, slot master, box \[1:2,0:3\]: damaged"
    ):
        source.read("t", "master", whole((2, 3)))
    with pytest.raises(CheckpointError, match="damaged"):
        source.verify()
    (tmp_path / "f").write_bytes(raw[:20])
    with pytest.raises(CheckpointError, match="truncated, or changed"):
        source.read("t", "master", Box((0, 0), (1, 3)))
