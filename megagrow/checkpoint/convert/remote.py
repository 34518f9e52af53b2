"""Checkpoints of any format in an object store, as local copies while a command needs them.

Reading downloads to a temporary directory (TMPDIR), writing uploads from one; both are removed
afterwards.  A native checkpoint counts when its manifest is there; the other formats have none, so
during an upload an object `megagrow.partial` says that it is not complete.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megagrow.checkpoint.io.object_store import ObjectStore
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.remote import RemoteSteps
from megagrow.checkpoint.native.retention import free_bytes
from megagrow.checkpoint.native.steps import step_of, step_path
from megagrow.errors import CheckpointError

PARTIAL = "megagrow.partial"


@contextmanager
def fetched(url: str, *, values: bool = True) -> Iterator[Path]:
    """A local copy of the checkpoint of a URL; of a directory of steps, of the newest.

    Args:
        values: whether the values are needed; if not, those of a native checkpoint are holes, whose
            checksums are wrong.

    Raises:
        CheckpointError: there is none, it is partial or damaged, or TMPDIR has too little space.
    """
    store = ObjectStore(url)
    held = store.sizes()
    if PARTIAL in held:
        raise CheckpointError(
            f"{url}: not a complete checkpoint",
            found=f"{PARTIAL}: an upload that did not finish",
            fix="repeat the conversion that wrote it, to another URL",
        )
    last = store.url.rpartition("/")[2] or "checkpoint"
    remote = RemoteSteps(url)
    steps = [] if manifests.NAME in held else remote.steps()
    with _directory() as temporary:
        if steps or manifests.NAME in held or step_of(Path(last)) is not None:
            name = step_path(Path(), steps[-1]).name if steps else ""
            place = temporary / (name or last)
            place.mkdir()
            remote.download(name, place, values=values)
            yield place
        else:
            yield _everything(store, held, temporary / last)


def _everything(store: ObjectStore, held: Mapping[str, int], place: Path) -> Path:
    if not held:
        raise CheckpointError(f"{store.url}: no checkpoint", found="nothing by that name")
    if free_bytes(place.parent) < sum(held.values()):
        raise CheckpointError(
            f"{place.parent}: not enough disk space for {store.url}",
            found=f"{free_bytes(place.parent):,} bytes free",
            expected=f"at least {sum(held.values()):,} bytes free",
            fix="set TMPDIR to a directory on a larger disk",
        )
    for name in held:
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(f"{store.url}/{name}: not a name of a file below a directory")
    store.get([(name, place / name) for name in held])
    return place


@contextmanager
def as_local(place: Path | str, *, values: bool = True) -> Iterator[Path]:
    """A path as it is, or a local copy of what a URL names (`fetched`)."""
    if isinstance(place, Path):
        yield place
    else:
        with fetched(place, values=values) as copy:
            yield copy


@contextmanager
def as_target(place: Path | str) -> Iterator[Path]:
    """A path as it is, or a local name whose directory goes to a URL (`uploaded`)."""
    if isinstance(place, Path):
        yield place
    else:
        with uploaded(place) as path:
            yield path


@contextmanager
def uploaded(url: str) -> Iterator[Path]:
    """A local name for a checkpoint that is uploaded when the block ends; nothing if it raises.

    Raises:
        CheckpointError: something is there already, or the store cannot be written.
    """
    store = ObjectStore(url)
    if held := store.sizes():
        raise CheckpointError(
            f"{url}: something is there already",
            found=", ".join(sorted(held)[:8]),
            expected="nothing by that name",
        )
    store.try_out()
    with _directory() as temporary:
        path = temporary / store.url.rpartition("/")[2]
        yield path
        names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
        native = manifests.NAME in names
        if not native:
            store.write(PARTIAL, b"")
        store.put([(path / n, n) for n in names if n != manifests.NAME], go_on=lambda: None)
        sizes = store.sizes()
        for name in names:
            if name != manifests.NAME and sizes.get(name) != (path / name).stat().st_size:
                raise CheckpointError(f"{url}/{name}: not there after its upload")
        if native:
            store.write(manifests.NAME, (path / manifests.NAME).read_bytes())
        else:
            store.delete([PARTIAL])


@contextmanager
def _directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="megagrow-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
