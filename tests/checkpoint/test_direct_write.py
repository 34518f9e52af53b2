"""Writes past the page cache produce the same files as plain writes, in every case."""

import errno
import fcntl
import os

import pytest
import torch

from megagrow.checkpoint.io import direct_write as direct
from megagrow.checkpoint.io.direct_write import page_aligned, write_past_cache

MIB = 1 << 20


def data_of(count):
    buffer = page_aligned(count)
    buffer.copy_(torch.arange(count) % 251)
    return buffer.numpy().data


def write(path, data, *, start=0):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.lseek(descriptor, start, os.SEEK_SET)
        write_past_cache(descriptor, data)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == start + len(data)
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct._DIRECT
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("count", [1, 4096, MIB - 1, MIB, 3 * MIB + 4095, 4 * MIB])
@pytest.mark.parametrize("start", [0, 8192, 100])
def test_any_length_at_any_place(tmp_path, count, start):
    data = data_of(count)
    write(tmp_path / "file", data, start=start)
    found = (tmp_path / "file").read_bytes()
    assert found == bytes(start) + bytes(data)


def test_whole_blocks_go_past_the_cache(tmp_path, monkeypatch):
    seen = []

    def watched(descriptor, data):
        direct_ = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct._DIRECT)
        seen.append((len(data), direct_))
        return real(descriptor, data)

    real = os.write
    monkeypatch.setattr(os, "write", watched)
    write(tmp_path / "file", data_of(2 * MIB + 5))
    if seen[0] != (2 * MIB, True):
        pytest.skip(f"{tmp_path} is on a file system without direct writes")
    assert seen == [(2 * MIB, True), (5, False)]


@pytest.mark.parametrize("taken", [4096, 5000])
def test_short_writes(tmp_path, monkeypatch, taken):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:taken]))
    data = data_of(MIB + 4096)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == bytes(data)


def test_a_file_system_without_them(tmp_path, monkeypatch):
    real = fcntl.fcntl

    def refusing(descriptor, command, flags=0):
        if command == fcntl.F_SETFL and flags & direct._DIRECT:
            raise OSError(errno.EINVAL, "no direct writes here")
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    data = data_of(2 * MIB)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == bytes(data)


def test_errors_are_the_systems_own(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "file", data_of(MIB))
