"""Which checkpoints of a run are kept, and which may be deleted when a disk is full.

After a save all but the newest `keep` are deleted, but never the newest that can be opened, and
one that is being uploaded only after a later save.  If there is no space for a save, as after a
growth, it deletes first what it would delete right afterwards: the oldest beyond the newest
`keep - 1`, no more of them than the save needs, and none if that does not free enough.  Beyond that
the user must decide, and gets a list of names and sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import (
    discard,
    is_claimed,
    list_steps,
    put_aside,
    step_path,
)
from megagrow.errors import CheckpointError


def retire(root: Path, keep: int, *, verify: bool = False) -> list[Path]:
    """Delete all committed checkpoints but the newest `keep`; returns what was deleted.

    If none of those can be opened, the newest older one that can is kept too, so that a
    run never deletes the last state it can return to.  Called by one process only.

    Args:
        verify: whether "can be opened" includes every checksum (reads a whole checkpoint).

    Raises:
        CheckpointError: a rename or deletion failed.
        ValueError: `keep` is not positive.
    """
    doomed = superseded(root, keep, verify=verify)
    for path in doomed:
        discard(path)
    return doomed


def superseded(root: Path, keep: int, *, verify: bool = False) -> list[Path]:
    """What `retire` would delete, oldest first.

    Raises:
        ValueError: `keep` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    steps = list_steps(root)
    old = steps[:-keep]
    if not old:
        return []
    good = next((s for s in reversed(steps) if _is_good(step_path(root, s), verify)), None)
    paths = [step_path(root, step) for step in old if step != good]
    return [path for path in paths if not is_claimed(path)]  # an upload reads it


def free_room(root: Path, *, needed: int, keep: int | None, say: Callable[[str], None]) -> None:
    """Delete checkpoints that a save would make superfluous, if that frees enough space.

    Args:
        needed: size of the save in bytes.
        keep: number of checkpoints kept after it; None deletes nothing.
        say: called with what is deleted, and why.

    Raises:
        CheckpointError: there is still too little space; names the existing checkpoints.
    """
    free = free_bytes(root)
    if free < needed and keep is not None:
        for path in _enough(superseded(root, max(keep - 1, 1)), needed - free):
            say(
                f"{path} is deleted ({size_of(path):,} bytes): the next checkpoint needs "
                f"{needed:,} bytes, {free:,} are free, and checkpoint.keep = {keep} would delete "
                "it right after"
            )
            discard(path)
        free = free_bytes(root)
    if free < needed:
        raise CheckpointError(
            f"{root}: not enough disk space for the next checkpoint",
            found=f"{free:,} bytes free; {_held(root)}",
            expected=f"at least {needed:,} bytes free",
            fix=_fix(root, int(needed - free)),
        )


def free_bytes(path: Path) -> float:
    """Free bytes for this user on a directory's file system."""
    status = os.statvfs(path)
    # Some network file systems report no size; there the writes themselves will fail if full.
    return status.f_bavail * status.f_frsize if status.f_blocks else float("inf")


def size_of(path: Path) -> int:
    """Total size of a checkpoint's files in bytes."""
    return sum(file.lstat().st_size for file in path.iterdir())


def _enough(paths: Sequence[Path], lacking: float) -> list[Path]:
    """The first of the paths that add up to `lacking` bytes; none if all together do not."""
    totals = list(accumulate(size_of(path) for path in paths))
    count = next((number for number, total in enumerate(totals, 1) if total >= lacking), 0)
    return list(paths[:count])


def _held(root: Path) -> str:
    """The existing checkpoints as text."""
    sizes = [f"{path.name} ({size_of(path):,} bytes)" for path in _all(root)]
    return f"older checkpoints: {', '.join(sizes)}" if sizes else "no older checkpoint"


def _fix(root: Path, lacking: int) -> str:
    old = superseded(root, 1)
    enough = _enough(old, lacking)
    if enough:
        names = " ".join(map(str, enough))
        return (
            f"free disk space, for instance: rm -r {names}; or keep fewer checkpoints "
            "(a lower checkpoint.keep) from the next start on"
        )
    return (
        f"free {lacking:,} bytes of disk space; the older checkpoints do not hold so much "
        "besides the last good one, so fewer of them (checkpoint.keep) would not do"
    )


def _all(root: Path) -> Iterator[Path]:
    return (step_path(root, step) for step in list_steps(root))


def set_aside(root: Path, after_step: int) -> list[Path]:
    """Rename the checkpoints newer than a step, when a run goes back to that step.

    They no longer belong to the run, yet may be wanted: nothing deletes them.

    Returns:
        Their new paths, `step_<step>.set-aside-<nonce>`, in ascending order of steps.
    """
    return [put_aside(step_path(root, s)) for s in list_steps(root) if s > after_step]


def _is_good(path: Path, verify: bool) -> bool:
    try:
        checkpoint = NativeCheckpoint.open(path)
        if verify:
            checkpoint.verify()
    except CheckpointError:
        return False
    return True
