"""Write past the page cache: a checkpoint is larger than the cache and not read again soon.

The system then needs no memory for data that only passes through, and keeps its cached files.
File systems without direct I/O get ordinary cached writes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import torch

from megagrow.checkpoint.io.files import write_all

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_BLOCK = 4096  # alignment of positions, lengths and addresses that suits any disk
_LEAST_BYTES = 1 << 20  # smaller writes are not worth waiting for the disk


def page_aligned(count: int) -> torch.Tensor:
    """A byte buffer aligned so that it can be written past the cache."""
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def write_past_cache(descriptor: int, data: memoryview) -> None:
    """Write all bytes at the descriptor's position, whole blocks past the cache.

    Args:
        data: from the start of a `page_aligned` buffer.
    """
    whole = len(data) - len(data) % _BLOCK
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    if _DIRECT and whole >= _LEAST_BYTES and at % _BLOCK == 0:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT)
            # After a short write that ends inside a block, the rest goes through the cache.
            while whole and whole % _BLOCK == 0:
                written = os.write(descriptor, data[:whole])
                data, whole = data[written:], whole - written
                if written == 0:
                    break
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    write_all(descriptor, data)
