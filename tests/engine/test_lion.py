"""Lion: its update, new blocks, every layout, growth by the gradient law, and resuming."""

import numpy as np
import torch

from megagrow.engine.optimizers.blockwise import BlockLion, YoungShard
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.state.boxes import whole
from megagrow.state.layout import Layout
from tests.engine.plays import SEED, Job, data_layouts, model_layouts, play_all
from tests.ranks import run_ranks
from tests.toys import grow

LR, BETAS, DECAY = 1e-2, (0.9, 0.99), 0.3
LION = {"name": "lion", "betas": BETAS, "weight_decay": DECAY}


def _reference(parameter, gradients, *, lr=lambda step: LR):
    """Lion, element by element, as in the paper: (parameters, moments)."""
    p, m = parameter.clone(), torch.zeros_like(parameter)
    for step, g in enumerate(gradients):
        c = BETAS[0] * m + (1 - BETAS[0]) * g
        p = p - lr(step) * (c.sign() + DECAY * p)
        m = BETAS[1] * m + (1 - BETAS[1]) * g
    return p, m


def _optimizer(parameters):
    group = {"params": parameters, "lr_factor": 0.5, "weight_decay": DECAY, "eps": 1e-8}
    optimizer = BlockLion([group], betas=BETAS)
    optimizer.make_state(parameters, step=0)
    optimizer.set_learning_rate(2 * LR)
    return optimizer


def _step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def test_the_update_is_the_papers():
    torch.manual_seed(0)
    start = [torch.randn(5, 7, dtype=torch.float64), torch.randn(11, dtype=torch.float64)]
    parameters = [torch.nn.Parameter(x.clone()) for x in start]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(6)]
    optimizer = _optimizer(parameters)
    for row in gradients:
        _step(optimizer, parameters, row)
    for i, parameter in enumerate(parameters):
        p, m = _reference(start[i], [row[i] for row in gradients])
        torch.testing.assert_close(parameter.detach(), p, rtol=1e-12, atol=1e-14)
        state = optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg"], m, rtol=1e-12, atol=1e-14)
        assert state["step"] == 6 and set(state) == {"step", "exp_avg"}


def test_young_blocks_have_rates_of_their_own():
    torch.manual_seed(1)
    start = torch.randn(4, 6, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    gradients = [torch.randn_like(start) for _ in range(5)]
    young = YoungBlocks(kept=((0, 1, 2), (0, 1, 3)), born=0, peak=1.3, rewarm=3)
    optimizer = _optimizer([parameter])
    optimizer.set_young({parameter: [YoungShard(0, whole((4, 6)), young)]})
    for gradient in gradients:
        _step(optimizer, [parameter], [gradient])
    old, _ = _reference(start, gradients)
    new, _ = _reference(start, gradients, lr=lambda step: LR * young.lr_factor(step + 1))
    expected = new.clone()
    expected[:2, :3] = old[:2, :3]
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(old, new)


def _story(layout, target):
    return [("train", 5), ("grow", "width", "sparkling", 2, target), ("train", 5)], {
        "layout": layout,
        **LION,
    }


def test_every_layout_has_the_loss_curve_of_one_process():
    # The sign of a gradient that is almost zero may differ between layouts.
    expected = run_ranks(1, play_all, [_story(Layout(), Layout())])[0][0][0]
    assert expected[-1] < expected[0]
    layouts = data_layouts(2) + model_layouts(2)
    stories = [_story(a, b) for a, b in zip(layouts, layouts[3:] + layouts[:3], strict=True)]
    for losses, *_ in run_ranks(2, play_all, stories)[0]:
        np.testing.assert_allclose(losses, expected, rtol=2e-4)


def _commute(comm):
    faults = []
    for operator, policy in (("width", "exact"), ("width", "sparkling"), ("depth_stack", "copy")):
        job = Job(comm, layout=Layout(data=2, zero=1), fresh=False, **LION)
        state, model = job.load(seed=4), job.model
        job.grow(operator, policy, 2, Layout(tensor=2))
        expected = grow(model, state, operator=operator, policy=policy, factor=2, seed=SEED)[2]
        faults.append(job.fault(expected))
        assert [slot.name for slot in job.engine.slots] == ["master", "exp_avg"]
    return faults


def test_its_momentum_grows_as_the_gradient_does():
    assert run_ranks(2, _commute) == [[None] * 3] * 2


def _retrace(comm):
    small, large = Job(comm, grad_clip=0.0, **LION), Job(comm, grad_clip=0.0, **LION)
    small.train(8)
    large.train(4)
    large.grow("width", "exact", 2, Layout())
    large.train(4)
    return small.losses, large.losses


def test_exact_growth_retraces_the_small_run():
    small, large = run_ranks(1, _retrace)[0]
    np.testing.assert_allclose(large, small, rtol=1e-5)
