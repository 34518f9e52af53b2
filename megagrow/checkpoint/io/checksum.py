"""CRC-32 (that of zlib and of zip archives), as fast as this machine has it.

isal's uses the carry-less multiplication of x86 and ARM: several times as fast as zlib's, which
takes its place where isal is not installed.  Both give the same numbers.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
