"""Native checkpoints in an object store: copies of committed local ones.

    s3://bucket/run/step_00001000/manifest.json             written last, deleted first
    s3://bucket/run/step_00001000/rank_00000.safetensors
    s3://bucket/run/step_00001000.set-aside-<nonce>/...     as for directories

An object store has no rename.  A checkpoint counts when its manifest is there; without it, objects
are what an upload left that did not finish, and no reader takes them.  A download has a temporary
name, is checked against every checksum of the manifest, and only then committed by a rename.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megagrow.checkpoint.io.files import naming, read_small, write_new
from megagrow.checkpoint.io.object_store import ObjectStore
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.manifest import Manifest, file_name
from megagrow.checkpoint.native.proof import Contents, prove
from megagrow.checkpoint.native.retention import free_bytes
from megagrow.checkpoint.native.save import commit
from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import aside_name, claim, step_of, step_path, temporary_path
from megagrow.errors import CheckpointError
from megagrow.files import sync_file

_STEP = re.compile(r"(step_\d{8,})/")


class RemoteSteps:
    """The checkpoints below a URL.

    Args:
        url: of a directory of checkpoints.

    Raises:
        CheckpointError: as `ObjectStore`.
    """

    def __init__(self, url: str) -> None:
        self.store = ObjectStore(url)

    def steps(self) -> list[int]:
        """Steps whose manifest is there, ascending (raises CheckpointError)."""
        return _complete(self.store.sizes())

    def manifest(self, step: int) -> Manifest:
        """A step's manifest (raises CheckpointError: missing or damaged)."""
        name = f"{_name(step)}/{manifests.NAME}"
        return manifests.unseal(self.store.read(name), where=f"{self.store.url}/{name}")

    def upload(self, path: Path, *, go_on: Callable[[], None] = lambda: None) -> int:
        """Copy a committed local checkpoint; it is not deleted meanwhile.

        Args:
            go_on: called before each object; its exception ends the upload.

        Returns:
            Bytes copied; 0 if it is there already.

        Raises:
            CheckpointError: an upload failed, and nothing that counts is there; or another
                checkpoint of this step is there.
        """
        with naming(path, "cannot be read"), claim(path):
            text = read_small(path / manifests.NAME, manifests.BYTES_LIMIT)
            files = manifests.unseal(text, where=str(path / manifests.NAME)).files
            names = {f"{path.name}/{file_name(n)}": file.size for n, file in enumerate(files)}
            seal = f"{path.name}/{manifests.NAME}"
            held = self.store.sizes(path.name)
            if seal in held:
                return self._require_same(seal, text)
            self.store.delete([name for name in held if name not in names])
            self.store.put([(path / name.split("/")[1], name) for name in names], go_on=go_on)
            require_sizes(self.store.sizes(path.name), names, url=self.store.url)
            go_on()
            self.store.write(seal, text)
        return sum(names.values()) + len(text)

    def _require_same(self, seal: str, text: bytes) -> int:
        if self.store.read(seal) != text:
            raise CheckpointError(
                f"{self.store.url}/{seal}: another checkpoint of this step is there already, and "
                "a committed one is never overwritten",
                fix="delete or move it, this object first; or set checkpoint.remote to another URL",
            )
        return 0

    def fetch(self, step: int, root: Path) -> Path:
        """Download a step, compare every checksum, and commit it as `root/step_<step>`.

        Raises:
            CheckpointError: missing, partial or damaged, or the disk has too little space; `root`
                has no new checkpoint.
        """
        name, final = _name(step), step_path(root, step)
        text, contents, sizes = self._contents(name)
        with naming(root, "cannot be made"):
            root.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(root, step, secrets.token_hex(8))
        with _removed_on_error(temporary):
            with naming(temporary, "cannot be made"):
                temporary.mkdir()
            with claim(temporary):
                self._get(name, sizes, temporary)
                self._verify(name, NativeCheckpoint(temporary, contents, verify=True))
                for file in sizes:
                    with naming(temporary / file, "cannot be synchronised"):
                        sync_file(temporary / file)
                commit(root, temporary, final, text)
        return final

    def download(self, name: str, directory: Path, *, values: bool) -> None:
        """Download a checkpoint into an empty directory.

        Args:
            name: of the checkpoint below the URL; "" is the URL itself.
            values: without them only the manifest and the heads of files are downloaded, and the
                values are holes: enough to look at a checkpoint of any size.  Whoever reads one
                finds that its checksum is wrong.

        Raises:
            CheckpointError: missing or partial, or the disk has too little space.
        """
        text, contents, sizes = self._contents(name)
        if values:
            self._get(name, sizes, directory)
        else:
            for (file, size), head in zip(sizes.items(), contents.heads, strict=True):
                data = self.store.read(_join(name, file), 0, len(head))
                with naming(directory / file, "cannot be written"):
                    write_new(directory / file, data)
                    os.truncate(directory / file, size)
        with naming(directory / manifests.NAME, "cannot be written"):
            write_new(directory / manifests.NAME, text)

    def _get(self, name: str, sizes: Mapping[str, int], directory: Path) -> None:
        free, needed = free_bytes(directory), sum(sizes.values())
        if free < needed:
            raise CheckpointError(
                f"{directory}: not enough disk space for {self.store.url}/{name}",
                found=f"{free:,} bytes free",
                expected=f"at least {needed:,} bytes free",
                fix="free space, or choose a larger disk (run.dir; TMPDIR for a conversion)",
            )
        self.store.get([(_join(name, file), directory / file) for file in sizes])

    def _verify(self, name: str, copy: NativeCheckpoint) -> None:
        try:
            copy.verify()
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.store.url}/{name}: damaged, there or on the way\n{error}",
                fix="try again, or resume from another checkpoint (--resume good)",
            ) from None

    def _contents(self, name: str) -> tuple[bytes, Contents, dict[str, int]]:
        """A checkpoint's manifest, as bytes and proved, and its files, whose sizes agree."""
        seal = _join(name, manifests.NAME)
        held = self.store.sizes(name)
        where = f"{self.store.url}/{seal}"
        if seal not in held:
            raise CheckpointError(
                f"{where.removesuffix('/' + manifests.NAME)}: not a committed checkpoint",
                found="an upload that did not finish" if held else "nothing by that name",
                expected=f"objects with {manifests.NAME}, which is written last",
            )
        text = self.store.read(seal)
        contents = prove(manifests.unseal(text, where=where), where=where)
        sizes = {file_name(n): file.size for n, file in enumerate(contents.manifest.files)}
        require_sizes(held, {_join(name, f): s for f, s in sizes.items()}, url=self.store.url)
        return text, contents, sizes

    def retire(self, keep: int) -> list[int]:
        """Delete all but the newest `keep`, and what unfinished uploads of older steps left.

        Returns:
            The steps deleted.

        Raises:
            CheckpointError: a deletion failed; what it had begun with does not count any more.
        """
        held = self.store.sizes()
        steps = _complete(held)
        doomed = steps[:-keep]
        self._delete(held, doomed)
        left = {step for name in held if (step := _step_in(name)) is not None} - set(steps)
        self._delete(held, [step for step in left if steps and step < steps[-1]])
        return doomed

    def set_aside(self, after_step: int) -> list[str]:
        """Copy the checkpoints newer than a step to names that no reader takes, and delete them.

        Returns:
            Their new names, in ascending order of steps.
        """
        held = self.store.sizes()
        moved = []
        for step in _complete(held):
            if step <= after_step:
                continue
            aside = aside_name(_name(step))
            names = [name for name in held if _step_in(name) == step]
            self.store.copy([(name, name.replace(_name(step), aside, 1)) for name in names])
            self._delete(held, [step])
            moved.append(aside)
        return moved

    def _delete(self, held: Mapping[str, int], steps: list[int]) -> None:
        for step in steps:
            names = [name for name in held if _step_in(name) == step]
            seals = [name for name in names if name.endswith(f"/{manifests.NAME}")]
            self.store.delete(seals)  # from here on it does not count
            self.store.delete([name for name in names if name not in seals])


def require_sizes(held: Mapping[str, int], stated: Mapping[str, int], *, url: str) -> None:
    """Require that objects have the sizes that a manifest states (raises CheckpointError)."""
    for name, size in stated.items():
        if held.get(name) != size:
            raise CheckpointError(
                f"{url}/{name}: not the file that the checkpoint's manifest names",
                found="nothing by that name" if name not in held else f"{held[name]:,} bytes",
                expected=f"{size:,} bytes",
                fix="use another checkpoint; the next save is uploaded whole",
            )


def _name(step: int) -> str:
    return step_path(Path(), step).name


def _join(name: str, file: str) -> str:
    return f"{name}/{file}" if name else file


def _step_in(name: str) -> int | None:
    found = _STEP.match(name)
    return None if found is None else step_of(Path(found[1]))


def _complete(held: Mapping[str, int]) -> list[int]:
    steps = {step for name in held if (step := _step_in(name)) is not None}
    return sorted(step for step in steps if f"{_name(step)}/{manifests.NAME}" in held)


@contextmanager
def _removed_on_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
