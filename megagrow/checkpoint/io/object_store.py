"""Objects below a URL, by fsspec: `s3://bucket/run`, `gs://bucket/run`, any URL that it knows.

An object appears whole or not at all, but there is no rename: what several objects hold together
counts when one that is written last is there.  Endpoint and credentials are those of fsspec and of
the library for the protocol: environment variables and files, never a setting of megagrow.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagrow.background import Pool
from megagrow.errors import CheckpointError

# Objects moved at a time.  Libraries move parts of each side by side: s3fs 10 of 50 MB, in memory.
_AT_A_TIME = 2
_PROBE = ".megagrow-probe-"
INSTALL = "pip install 'megagrow[objects]', or the library that fsspec names for this protocol"


def below(url: str, root: str) -> bool:
    """Whether a URL is another one, or lies below it."""
    return f"{url.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")


class ObjectStore:
    """The objects below a URL; their names are relative to it, with slashes.

    Args:
        url: as fsspec knows them.

    Raises:
        CheckpointError: no library for such URLs is installed; nothing is contacted yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec.core
        except ImportError as error:
            raise CheckpointError(f"{url}: fsspec is not installed", fix=INSTALL) from error
        try:
            # No listing of an earlier moment, and no connection of a process that was forked.
            self._fs, root = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"{url}: cannot be opened", found=str(error).splitlines()[0], fix=INSTALL
            ) from error
        self._root: str = str(root).rstrip("/")

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name and size in bytes of each object (raises CheckpointError)."""
        with self._named(below, "cannot be listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._at(below), detail=True)
            except FileNotFoundError:
                # Nothing below it yet; but a bucket that does not exist is no place to write to.
                if not self._is_made_on_writing() and not self._fs.exists(self._bucket()):
                    raise
                return {}
        start = len(self._root) + 1
        return {
            name[start:]: int(facts["size"])
            for name, facts in found.items()
            if facts["type"] == "file"
        }

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """An object's bytes, or those of a range of it (raises CheckpointError)."""
        with self._named(name, "cannot be read"):
            return bytes(self._fs.cat_file(self._at(name), start=start, end=end))

    def write(self, name: str, data: bytes) -> None:
        """Write a small object (raises CheckpointError)."""
        with self._named(name, "cannot be written"):
            self._make_parent(name)
            self._fs.pipe_file(self._at(name), data)

    def put(self, files: Sequence[tuple[Path, str]], *, go_on: Callable[[], None]) -> None:
        """Upload files, each to the object of a name.

        Args:
            go_on: called before each; its exception ends the upload.

        Raises:
            CheckpointError: names the object.
        """

        def one(pair: tuple[Path, str]) -> None:
            path, name = pair
            go_on()
            with self._named(name, "cannot be written"):
                self._make_parent(name)
                self._fs.put_file(str(path), self._at(name))

        self._each(one, files)

    def get(self, files: Sequence[tuple[str, Path]]) -> None:
        """Download objects, each to a file (raises CheckpointError)."""

        def one(pair: tuple[str, Path]) -> None:
            name, path = pair
            with self._named(name, "cannot be read"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._at(name), str(path))

        self._each(one, files)

    def copy(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copy objects within the store, which need not pass through this host where it can."""

        def one(pair: tuple[str, str]) -> None:
            with self._named(pair[0], "cannot be copied"):
                self._make_parent(pair[1])
                self._fs.cp_file(self._at(pair[0]), self._at(pair[1]))

        self._each(one, pairs)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, in no order (raises CheckpointError)."""
        if names:
            with self._named(names[0], "cannot be deleted"):
                self._fs.rm([self._at(name) for name in names])

    def try_out(self) -> None:
        """Write, read, list and delete a small object: what a run will need later.

        Raises:
            CheckpointError: no credentials, no such bucket, no right, no connection.
        """
        name, text = f"{_PROBE}{secrets.token_hex(4)}", b"megagrow"
        self.write(name, text)
        try:
            found = self.read(name) if name in self.sizes() else b""
        finally:
            self.delete([name])
        if found != text:
            raise CheckpointError(
                f"{self.url}/{name}: is not what was written there a moment ago",
                found=repr(found),
                expected="a store whose reads and listings see every finished write",
            )

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _bucket(self) -> str:
        return self._root.split("/")[0]

    def _is_made_on_writing(self) -> bool:
        return bool(self._root.startswith("/"))  # directories, as of file://

    def _make_parent(self, name: str) -> None:
        if self._is_made_on_writing():
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)

    def _each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        with Pool(_AT_A_TIME, "objects") as pool:
            pool.map(work, items)

    @contextmanager
    def _named(self, name: str, fault: str) -> Iterator[None]:
        """Errors of whatever library serves the protocol, as one of an object of this store."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # each library has classes of its own
            where = f"{self.url}/{name}" if name else self.url
            kind = type(error).__name__
            raise CheckpointError(
                f"{where}: {fault}", found=f"{kind}: {error}"[:300], fix=_fix(kind)
            ) from error


def _fix(kind: str) -> str:
    if "Credential" in kind:
        return (
            "give credentials as the store's own tools take them, on rank 0's host (for s3://: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials)"
        )
    if kind == "PermissionError":
        return "give these credentials the right to list, read, write and delete there"
    if kind == "FileNotFoundError":
        return "make the bucket, or correct the URL"
    return "check that the store can be reached from rank 0's host (for s3://: AWS_ENDPOINT_URL)"
