"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

from megagrow.checkpoint.directory import discard, list_steps, put_aside, step_path
from megagrow.checkpoint.native import NativeCheckpoint
from megagrow.errors import CheckpointError


def retire(root: Path, keep: int, *, verify: bool = False) -> list[Path]:
    """Delete all committed checkpoints but the newest `keep`; returns what was deleted.

    If none of those can be opened, the newest older one that can stays too, so that a
    run never deletes the last state it can go back to.  One process calls.

    Args:
        verify: whether "can be opened" includes every checksum (reads a whole checkpoint).

    Raises:
        CheckpointError: the system refused to rename or delete.
        ValueError: `keep` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    steps = list_steps(root)
    old = steps[:-keep]
    if not old:
        return []
    good = next((s for s in reversed(steps) if _is_good(step_path(root, s), verify)), None)
    doomed = [step_path(root, step) for step in old if step != good]
    for path in doomed:
        discard(path)
    return doomed


def set_aside(root: Path, after_step: int) -> list[Path]:
    """Rename the checkpoints newer than a step, when a run goes back to that step.

    Their future is no longer the run's, yet they may be wanted: nothing deletes them.

    Returns:
        Their new paths, `step_<step>.set-aside-<nonce>`, in rising order of steps.
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
