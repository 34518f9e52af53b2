"""What tests of runs share: bad losses, the content of checkpoints."""

import torch

from megagrow.checkpoint import NativeCheckpoint
from megagrow.state.boxes import whole
from megagrow.state.catalog import slots_of


def spoil_losses(rank, bad_rank, steps, factor):
    """Multiply the losses of some steps (counted over the whole job), on one rank."""
    from megagrow.engine.engine import Engine
    from megagrow.models import transformer

    loss_function, train_step, count = (
        transformer.vocab_parallel_cross_entropy,
        Engine.train_step,
        0,
    )

    def counting(self, *args, **more):
        nonlocal count
        count += 1
        return train_step(self, *args, **more)

    def spoiled(*args, **more):
        loss = loss_function(*args, **more)
        bad = count in steps and torch.is_grad_enabled() and rank == bad_rank
        return loss * factor if bad else loss

    Engine.train_step = counting
    transformer.vocab_parallel_cross_entropy = spoiled


def same_tensors(a, b):
    """Every slot of every tensor, bit for bit."""
    a, b = NativeCheckpoint.open(a), NativeCheckpoint.open(b)
    assert a.catalog == b.catalog and a.run_state == b.run_state
    for tensor in a.catalog:
        for slot in slots_of(tensor, a.slots):
            box = whole(tensor.shape)
            one, two = a.read(tensor.name, slot.name, box), b.read(tensor.name, slot.name, box)
            assert torch.equal(one, two), (tensor.name, slot.name)


def groups_in(value):
    """Every parameter group of an optimizer in a loaded file's value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from item if key == "param_groups" else groups_in(item)
