"""What both ends of a lifeline do alike: prove that they know the secret, and seal each message.

    supervisor                                   peer
      32 random bytes                   ->
                                        <-   32 random bytes, proof
      proof                             ->
      messages                          <->  messages

A proof is an HMAC over both random values: it shows that a side knows the job's secret, and is
worth nothing in another connection.  The secret itself is never sent.  Every message carries an
HMAC over its number and its content, under a key of this connection and direction, so nobody else
on the network can insert, change, repeat or reorder one.  Messages are not encrypted.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagrow.errors import ConfigError

NONCE = 32
PROOF = 32
HEAD = 4 + PROOF  # length and seal
LONGEST = 1 << 20  # bytes of one message
SECRET = "MEGAGROW_SECRET"  # in the environment of node supervisors, and of ranks on their hosts
# Or the path of a file with it, which only its owner may read, or of a directory with such a file
# for each host.
SECRET_FILE = "MEGAGROW_SECRET_FILE"
_SHORTEST = 16  # characters


def proof(secret: bytes, side: str, nonces: bytes) -> bytes:
    """What `side` sends to show that it knows the secret."""
    return hmac.digest(secret, f"megagrow proof of the {side}".encode() + nonces, "sha256")


def proves(shown: bytes, secret: bytes, side: str, nonces: bytes) -> bool:
    """Whether `shown` is that proof."""
    return hmac.compare_digest(shown, proof(secret, side, nonces))


class Seal:
    """Seals the messages of one direction, or checks their seals.

    Args:
        side: the sender.
        nonces: both random values, the supervisor's first.
    """

    def __init__(self, secret: bytes, side: str, nonces: bytes) -> None:
        self._key = hmac.digest(secret, f"megagrow key of the {side}".encode() + nonces, "sha256")
        self._count = 0

    def wrap(self, message: Mapping[str, Any] | None) -> bytes:
        """The bytes of a message; None is a sign of life without content."""
        body = b"" if message is None else json.dumps(message, default=str).encode()
        return len(body).to_bytes(4, "big") + self._tag(body) + body

    def open(self, head: bytes, body: bytes) -> dict[str, Any] | None:
        """The message of a head and a body.

        Raises:
            ValueError: it is not from the other side, or no message.
        """
        if not hmac.compare_digest(head[4:], self._tag(body)):
            raise ValueError("a message without a valid seal")
        message = json.loads(body) if body else None
        if message is not None and not isinstance(message, dict):
            raise ValueError("a message is an object")
        return message

    def _tag(self, body: bytes) -> bytes:
        self._count += 1
        return hmac.digest(self._key, self._count.to_bytes(8, "big") + body, "sha256")


def length(head: bytes) -> int:
    """The number of bytes that follow a head.

    Raises:
        ValueError: more than any message has.
    """
    size = int.from_bytes(head[:4], "big")
    if size > LONGEST:
        raise ValueError(f"a message of {size} bytes")
    return size


class Splitter:
    """Splits received bytes into messages."""

    def __init__(self, seal: Seal) -> None:
        self._seal, self._rest = seal, b""

    def feed(self, fresh: bytes) -> Iterator[dict[str, Any] | None]:
        """The messages that these bytes complete.

        Raises:
            ValueError: as `Seal.open` and `length`.
        """
        self._rest += fresh
        while len(self._rest) >= HEAD:
            end = HEAD + length(self._rest[:HEAD])
            if len(self._rest) < end:
                return
            head, body = self._rest[:HEAD], self._rest[HEAD:end]
            self._rest = self._rest[end:]
            yield self._seal.open(head, body)


def secret_of(environ: Mapping[str, str]) -> bytes | None:
    """The job's secret, from the environment or the file that it names; None without one.

    Raises:
        ConfigError: it is too short, or other users may read its file.
    """
    text, where = environ.get(SECRET), SECRET
    if text is None and SECRET_FILE in environ:
        where = f"{SECRET_FILE}={environ[SECRET_FILE]}"
        try:
            path = Path(environ[SECRET_FILE])
            path = path / socket.gethostname() if path.is_dir() else path
            status = path.stat()
            if status.st_uid not in (os.getuid(), 0) or status.st_mode & (
                stat.S_IRWXG | stat.S_IRWXO
            ):
                raise ConfigError(
                    f"{where}: other users may read it",
                    found=f"mode {stat.S_IMODE(status.st_mode):04o} of user {status.st_uid}",
                    expected="a file of this user that no other may read",
                    fix=f"chmod 600 {path}",
                )
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where}: cannot be read", found=getattr(error, "strerror", None) or "not ASCII"
            ) from error
    if text is not None and len(text) < _SHORTEST:
        raise ConfigError(
            f"{where}: too short for a secret",
            found=f"{len(text)} characters",
            expected=f"at least {_SHORTEST}, at random, the same on all nodes of the job",
            fix=f"export {SECRET}=$(openssl rand -hex 16), once, where the job is submitted",
        )
    return None if text is None else text.encode()
