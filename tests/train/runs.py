"""What tests of runs share: bad losses, the content of checkpoints."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import NativeCheckpoint
from megagrow.state.boxes import whole
from megagrow.state.catalog import slots_of


def spoil_losses(rank: int, bad_rank: int, steps: Collection[int], factor: float) -> None:
    """Multiply the losses of some steps (counted over the whole job), on one rank."""
    from megagrow.engine.engine import Engine, StepResult
    from megagrow.models import transformer

    name = "vocab_parallel_cross_entropy"  # as it is imported there
    loss_function, train_step, count = getattr(transformer, name), Engine.train_step, 0

    def counting(self: Engine, *args: Any, **more: Any) -> StepResult:
        nonlocal count
        count += 1
        return train_step(self, *args, **more)

    def spoiled(*args: Any, **more: Any) -> torch.Tensor:
        loss = loss_function(*args, **more)
        bad = count in steps and torch.is_grad_enabled() and rank == bad_rank
        return loss * factor if bad else loss

    setattr(Engine, "train_step", counting)  # noqa: B010 - mypy takes no assignment to a method
    setattr(transformer, name, spoiled)


def same_tensors(path: Path, other: Path) -> None:
    """Every slot of every tensor, bit for bit."""
    a, b = NativeCheckpoint.open(path), NativeCheckpoint.open(other)
    assert a.catalog == b.catalog and a.run_state == b.run_state
    for tensor in a.catalog:
        for slot in slots_of(tensor, a.slots):
            box = whole(tensor.shape)
            one, two = a.read(tensor.name, slot.name, box), b.read(tensor.name, slot.name, box)
            assert torch.equal(one, two), (tensor.name, slot.name)


def groups_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every parameter group of an optimizer in a loaded file's value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from item if key == "param_groups" else groups_in(item)
