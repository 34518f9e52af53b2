"""CRC-32 (as in zlib and zip archives), with the fastest implementation available.

isal uses the carry-less multiplication of x86 and ARM and is several times as fast as zlib, the
fallback where isal is not installed.  Both give the same numbers.
"""

from __future__ import annotations

import math

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]


CHUNK_BYTES = 16 << 20


def checksum(data: memoryview) -> str:
    """CRC-32 of one chunk, as 8 hexadecimal digits."""
    return f"{crc32(data):08x}"


def checksum_count(size: int, chunk_bytes: int) -> int:
    """Number of chunks in a file."""
    return math.ceil(size / chunk_bytes)
