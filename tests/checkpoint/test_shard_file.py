"""The file of one rank: valid safetensors, written whole."""

import os
import random
import stat
import zlib

import pytest
import safetensors.torch
import torch

from megagrow.checkpoint.io.checksum import checksum_count
from megagrow.checkpoint.native.shard_file import (
    Part,
    Piece,
    file_order,
    lay_out,
    part_of,
    write_shard,
)
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, whole
from tests.checkpoint.worlds import CHUNK, random_cuts, random_values, save_world


def written(path, pieces, chunk_bytes=CHUNK):
    ordered = file_order(pieces)
    plan = lay_out([part_of(piece) for piece in ordered], {"format": "pt"})
    return plan, write_shard(path, plan.head, ordered, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [64, 256, 1 << 20])
def test_the_safetensors_library_reads_it(tmp_path, chunk_bytes):
    path, values = save_world(tmp_path, 7, world=3, chunk_bytes=chunk_bytes)
    for rank, pieces in enumerate(random_cuts(values, 3, 0)):
        file = path / f"rank_{rank:05d}.safetensors"
        read = safetensors.torch.load_file(file)
        assert len(read) == len(pieces)
        for piece in pieces:
            tensor = read[f"{piece.tensor}@{piece.slot}#{piece.box}"]
            assert torch.equal(tensor, piece.values)
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata()["step"] == "7"


def test_header_is_aligned_and_values_are_aligned_to_their_width(tmp_path):
    dtypes = [torch.uint8, torch.float64, torch.bool, torch.float32]
    pieces = [
        Piece(name, "s", whole((3,)), torch.ones(3, dtype=dtype))
        for name, dtype in zip("abcd", dtypes, strict=True)
    ]
    plan, _ = written(tmp_path / "f", pieces)
    assert len(plan.head) % 8 == 0
    assert plan.size == (tmp_path / "f").stat().st_size
    for piece, start in zip(file_order(pieces), plan.starts, strict=True):
        assert start % piece.values.element_size() == 0


def test_checksums_are_of_each_chunk_of_the_file(tmp_path):
    pieces = random_cuts(random_values(0), 1, 0)[0]
    plan, sums = written(tmp_path / "f", pieces)
    data = (tmp_path / "f").read_bytes()
    assert len(sums) == checksum_count(plan.size, CHUNK) > 5
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    assert sums == [f"{zlib.crc32(chunk):08x}" for chunk in chunks]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pieces = random_cuts(random_values(0), 1, 0)[0]
    _, sums = written(tmp_path / "whole", pieces)
    rng, write = random.Random(0), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: rng.randint(1, len(data))]))
    assert written(tmp_path / "short", pieces)[1] == sums
    assert (tmp_path / "short").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_system_that_writes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(CheckpointError, match="wrote nothing"):
        written(tmp_path / "f", random_cuts(random_values(0), 1, 0)[0])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        path, _ = save_world(tmp_path / "root", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match=r"w@s#\[0:3\]"):
        part_of(Piece("w", "s", Box((0,), (3,)), torch.ones(4)))
    with pytest.raises(ValueError, match="complex64"):
        part_of(Piece("w", "s", Box((0,), (3,)), torch.ones(3, dtype=torch.complex64)))
    part = Part("w", "s", Box((0,), (3,)), "F32")
    with pytest.raises(ValueError, match="comes twice"):
        lay_out([part, part], {})
