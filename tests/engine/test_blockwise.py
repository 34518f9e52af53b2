"""AdamW with new blocks, against torch.optim.AdamW on old and new elements separately."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.engine.optimizers.blockwise import MOMENTS, BlockAdamW, YoungShard
from megagrow.engine.optimizers.generations import regions
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.state.boxes import Box, flat_range_boxes, whole

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-4, 0.1


@st.composite
def shapes_and_kept(draw):
    """A tensor's shape and its old block, an arithmetic progression per axis; maybe none."""
    shape, kept = [], []
    for _ in range(draw(st.integers(1, 4))):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        count = draw(st.integers(1, 3))
        last = start + (count - 1) * step
        shape.append(last + 1 + draw(st.integers(0, 3)))
        kept.append((start, step, count))
    return tuple(shape), None if draw(st.integers(0, 9)) == 0 else tuple(kept)


def old_mask(shape, kept):
    """Which elements belong to the old block."""
    mask = np.zeros(shape, bool)
    if kept is not None:
        mask[np.ix_(*([a + i * b for i in range(n)] for a, b, n in kept))] = True
    return mask


@given(case=shapes_and_kept(), data=st.data())
def test_regions_part_a_box_into_old_and_young(case, data):
    shape, kept = case
    offset = [data.draw(st.integers(0, n - 1)) for n in shape]
    lengths = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)]
    box = Box(tuple(offset), tuple(lengths))
    old, young = regions(kept, box)
    count = np.zeros((2, *box.shape), int)
    for index in old:
        count[0][index] += 1
    for index in young:
        count[1][index] += 1
    expected = old_mask(shape, kept)[box.slices]
    np.testing.assert_array_equal(count[0], expected)
    np.testing.assert_array_equal(count[1], ~expected)
    assert len(old) <= 1


def _cuts(volume, parts, data):
    inner = sorted(data.draw(st.integers(0, volume)) for _ in range(parts - 1))
    return list(itertools.pairwise([0, *inner, volume]))


class _Reference:
    """The same updates with torch.optim.AdamW, one optimizer for old and one for new elements."""

    def __init__(self, values, moments, old, young, before):
        self.young, self.before = young, before
        self.parts = []
        for mask, steps in ((old, before), (~old, before - young.born)):
            parameter = torch.nn.Parameter(values[mask].clone())
            optimizer = torch.optim.AdamW(
                [parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
            )
            state = {"step": torch.tensor(float(steps))}
            state |= {name: m[mask].clone() for name, m in zip(MOMENTS, moments, strict=True)}
            optimizer.state[parameter] = state
            self.parts.append((mask, parameter, optimizer))

    def step(self, gradient):
        self.before += 1
        for number, (mask, parameter, optimizer) in enumerate(self.parts):
            factor = self.young.lr_factor(self.before) if number else 1.0
            optimizer.param_groups[0]["lr"] = LR * factor
            parameter.grad = gradient[mask]
            optimizer.step()

    def values(self, shape, of=lambda parameter, state: parameter.detach()):
        out = torch.full(shape, torch.nan, dtype=torch.float64)
        for mask, parameter, optimizer in self.parts:
            out[mask] = of(parameter, optimizer.state[parameter])
        return out


@settings(max_examples=40, deadline=None)
@given(
    case=shapes_and_kept(),
    parts=st.integers(1, 4),
    seed=st.integers(0, 999),
    born=st.integers(0, 6),
    data=st.data(),
)
def test_young_blocks_step_as_two_optimizers_would(case, parts, seed, born, data):
    """The tensor is cut into flat ranges, each in the middle of a larger flat parameter."""
    shape, kept = case
    torch.manual_seed(seed)
    volume, before = int(np.prod(shape)), born + 2
    values, first = torch.randn(2, *shape, dtype=torch.float64)
    second = torch.rand(shape, dtype=torch.float64)
    gradients = torch.randn(3, *shape, dtype=torch.float64)
    young = YoungBlocks(kept=kept, born=born, peak=1.3, rewarm=4)
    old = torch.from_numpy(old_mask(shape, kept))
    reference = _Reference(values, (first, second), old, young, before)
    plain = torch.randn(2, 5, dtype=torch.float64)

    owners, shards = [], {}
    cuts = _cuts(volume, parts, data)
    for start, stop in cuts:
        pieces = [plain[0], values.view(-1)[start:stop], plain[1]]
        owner = torch.nn.Parameter(torch.cat(pieces))
        owners.append(owner)
        shards[owner] = [
            YoungShard(start=5 + at - start, box=box, blocks=young)
            for box, at in flat_range_boxes(shape, start, stop)
        ]
    group = {"params": owners, "lr_factor": 1.0, "weight_decay": DECAY, "eps": EPS}
    optimizer = BlockAdamW([group], betas=BETAS)
    optimizer.make_state(owners, step=before)
    optimizer.set_learning_rate(LR)
    optimizer.set_young(shards)
    for owner, (start, stop) in zip(owners, cuts, strict=True):
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            optimizer.state[owner][name][5 : 5 + stop - start] = moment.view(-1)[start:stop]
    for gradient in gradients:
        reference.step(gradient)
        for owner, (start, stop) in zip(owners, cuts, strict=True):
            edge = torch.ones(5, dtype=torch.float64)
            owner.grad = torch.cat([edge, gradient.view(-1)[start:stop], edge])
        optimizer.step()

    close = {"rtol": 1e-12, "atol": 1e-14}
    middle = [slice(5, 5 + stop - start) for start, stop in cuts]
    found = torch.cat([o.detach()[m] for o, m in zip(owners, middle, strict=True)]).view(shape)
    torch.testing.assert_close(found, reference.values(shape), **close)
    for name in MOMENTS:
        pieces = [optimizer.state[o][name][m] for o, m in zip(owners, middle, strict=True)]
        wanted = reference.values(shape, lambda _, state, name=name: state[name])
        torch.testing.assert_close(torch.cat(pieces).view(shape), wanted, **close)
    # Its surroundings moved like a plain parameter.
    edge = torch.nn.Parameter(plain[0].clone())
    around = torch.optim.AdamW([edge], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    around.state[edge] = {"step": torch.tensor(float(before))}
    around.state[edge] |= {name: torch.zeros(5, dtype=torch.float64) for name in MOMENTS}
    for _ in gradients:
        edge.grad = torch.ones(5, dtype=torch.float64)
        around.step()
    for owner in owners:
        torch.testing.assert_close(owner.detach()[:5], edge.detach(), **close)
        assert optimizer.state[owner]["step"] == before + 3


@pytest.mark.parametrize("with_young_elsewhere", [False, True])
def test_plain_parameters_equal_pytorchs_bit_for_bit(with_young_elsewhere):
    torch.manual_seed(0)
    start = [torch.randn(7, 9), torch.randn(1000), torch.randn(3, 4, 5)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    extra = torch.nn.Parameter(torch.randn(4))
    group = {"lr_factor": 0.5, "weight_decay": DECAY, "eps": EPS}
    optimizer = BlockAdamW([{"params": [*ours, extra], **group}], betas=BETAS)
    optimizer.make_state([*ours, extra], step=0)
    if with_young_elsewhere:
        young = YoungBlocks(kept=((0, 1, 2),), born=0, peak=1.3, rewarm=4)
        optimizer.set_young({extra: [YoungShard(0, whole((4,)), young)]})
    optimizer.set_learning_rate(LR)
    reference = torch.optim.AdamW(
        theirs, lr=LR * 0.5, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    for _ in range(5):
        extra.grad = torch.randn(4)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(optimizer.state[a][name], reference.state[b][name])
            for name in (*MOMENTS, "step")
        )


def test_a_parameter_without_gradient_is_left_alone():
    still, moving = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))
    group = {"params": [still, moving], "lr_factor": 1.0, "weight_decay": DECAY, "eps": EPS}
    optimizer = BlockAdamW([group], betas=BETAS)
    optimizer.make_state([still, moving], step=0)
    young = YoungBlocks(kept=((0, 1, 2),), born=0, peak=1.3, rewarm=0)
    optimizer.set_young({moving: [YoungShard(0, whole((4,)), young)], still: []})
    optimizer.set_learning_rate(LR)
    moving.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and (moving != 1).all()
    # The new part moves 1.3 times as far (both are on their first step).
    steps = 1 - moving.detach()
    assert float(steps[2] / steps[0]) == pytest.approx(1.3, rel=1e-5)


def test_young_blocks_need_their_state_first():
    parameter = torch.nn.Parameter(torch.ones(4))
    group = {"params": [parameter], "lr_factor": 1.0, "weight_decay": 0.0, "eps": EPS}
    optimizer = BlockAdamW([group], betas=BETAS)
    young = YoungBlocks(kept=None, born=0, peak=1.3, rewarm=0)
    optimizer.set_young({parameter: [YoungShard(0, whole((4,)), young)]})
    parameter.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="make_state first"):
        optimizer.step()
