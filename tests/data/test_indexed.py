"""The .bin/.idx format: every byte, and every kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.data.indexed import DTYPE_CODES, IndexedDataset, IndexedWriter, dtype_for
from megagrow.errors import DataError

# Two documents of uint16, [1, 2, 258] and [7], written out by hand.
BIN = bytes.fromhex("0100 0200 0201 0700".replace(" ", ""))
IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX, two zeros
    "0100000000000000"  # version 1
    "08"  # uint16
    "0200000000000000"  # two sequences
    "0300000000000000"  # three entries in the document table
    "03000000 01000000"  # lengths
    "0000000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000".replace(" ", "")
)


def write_raw(prefix: Path, idx: bytes = IDX, tokens: bytes = BIN) -> Path:
    prefix.with_suffix(".idx").write_bytes(idx)
    prefix.with_suffix(".bin").write_bytes(tokens)
    return prefix


def test_writer_makes_the_bytes_written_by_hand(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2, 258])
        writer.add_document([7])
    assert (tmp_path / "d.bin").read_bytes() == BIN
    assert (tmp_path / "d.idx").read_bytes() == IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_reader_reads_the_bytes_written_by_hand(tmp_path: Path) -> None:
    data = IndexedDataset(write_raw(tmp_path / "d"))
    assert [list(data[i]) for i in range(len(data))] == [[1, 2, 258], [7]]
    assert list(data[-1]) == [7]
    assert (data.total_tokens, data.document_count) == (4, 2)
    assert list(data.token_range(1, 4)) == [2, 258, 7]
    with pytest.raises(IndexError):
        data[2]
    with pytest.raises(IndexError):
        data.token_range(2, 5)


def test_reader_takes_several_sequences_per_document(tmp_path: Path) -> None:
    table = struct.pack("<2q", 0, 2)
    idx = IDX[:26] + struct.pack("<Q", 2) + IDX[34:58] + table
    data = IndexedDataset(write_raw(tmp_path / "d", idx))
    assert (len(data), data.document_count) == (2, 1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=9),
    dtype=st.sampled_from(["uint8", "int16", "int32", "int64", "uint16"]),
)
def test_round_trip(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    documents = [[token % 128 for token in document] for document in documents]
    with IndexedWriter(tmp_path / "d", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    data = IndexedDataset(tmp_path / "d")
    assert [list(data[i]) for i in range(len(data))] == documents
    assert data.dtype == np.dtype(dtype)
    assert data.total_tokens == sum(map(len, documents))


def test_parts_are_appended(tmp_path: Path) -> None:
    write_raw(tmp_path / "d")
    part = IndexedDataset(tmp_path / "d")
    with IndexedWriter(tmp_path / "e", "uint16") as writer:
        writer.add_part(part, 1, 2)
        writer.add_part(part, 0, 2)
        writer.add_part(part, 1, 1)
    data = IndexedDataset(tmp_path / "e")
    assert [list(data[i]) for i in range(len(data))] == [[7], [1, 2, 258], [7]]
    with pytest.raises(DataError, match="uint16"), IndexedWriter(tmp_path / "f", "int32") as writer:
        writer.add_part(part, 0, 2)


def test_nothing_remains_of_a_writer_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedWriter(tmp_path / "d", "uint16") as writer:
            writer.add_document([1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 65536])
def test_token_that_does_not_fit(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match="int32"), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([token])


def test_dtype_is_megatrons_choice() -> None:
    assert dtype_for(65_499) == "uint16"
    assert dtype_for(65_500) == "int32"
    assert DTYPE_CODES["uint16"] == 8 and DTYPE_CODES["int32"] == 4


def patched(offset: int, content: bytes) -> bytes:
    return IDX[:offset] + content + IDX[offset + len(content) :]


@pytest.mark.parametrize(
    ("idx", "word"),
    [
        (b"", "cut off"),
        (IDX[:33], "cut off"),
        (patched(0, b"X"), "first bytes"),
        (patched(9, b"\x02"), "version"),
        (patched(17, b"\x09"), "type code"),
        (patched(17, b"\x01"), "offset of sequence 1"),
        (patched(18, b"\x03"), "size"),
        (patched(18, b"\xff" * 8), "size"),
        (patched(26, b"\x04"), "size"),
        (patched(34, b"\x04"), "offset of sequence 1"),
        (patched(37, b"\x80"), "negative"),
        (patched(38, b"\x02"), "d.bin: length"),
        (patched(42, b"\x02"), "offset of sequence 0"),
        (patched(50, b"\x04"), "offset of sequence 1"),
        (patched(58, b"\x01"), "document table"),
        (patched(66, b"\x03"), "document table"),
        (patched(74, b"\x01"), "document table"),
        (IDX[:-1], "size"),
        (IDX + b"\x00", "size"),
    ],
)
def test_damaged_index_is_refused_by_name(tmp_path: Path, idx: bytes, word: str) -> None:
    write_raw(tmp_path / "d", idx)
    with pytest.raises(DataError, match=word) as caught:
        IndexedDataset(tmp_path / "d")
    assert str(tmp_path) in str(caught.value) and "fix" in str(caught.value)


@pytest.mark.parametrize("tokens", [BIN[:-1], BIN + b"\x00\x00", b""])
def test_token_file_of_wrong_length(tmp_path: Path, tokens: bytes) -> None:
    write_raw(tmp_path / "d", tokens=tokens)
    with pytest.raises(DataError, match=r"d\.bin: length"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    write_raw(tmp_path / "d").with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"d\{suffix}: cannot be read"):
        IndexedDataset(tmp_path / "d")
