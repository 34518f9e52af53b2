"""Muon: its update, new blocks, every layout, growth by the gradient law, and resuming."""

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from megagrow.engine.optimizers.muon import BlockMuon, SharedTensor, orthogonalised
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.layout import Layout
from megagrow.state.matrices import matrices
from tests.engine.plays import SEED, Job, data_layouts, model_layouts, play_all
from tests.ranks import run_ranks
from tests.toys import grow, toy_model

LR, DECAY, MOMENTUM = 1e-2, 0.3, 0.9
MUON = {"name": "muon", "weight_decay": 0.1, "muon_lr": 1e-2}
LLAMA = build_catalog(toy_model(family="llama", heads=4, kv_heads=2))


@pytest.fixture
def in_double_precision(monkeypatch):
    """DeepSpeed's iteration in fp64; by default it uses fp16 or fp32."""
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method="gram": torch.float64)


def test_fused_weights_are_several_matrices():
    sizes = {
        name: [(m.rows, m.columns) for m in matrices(LLAMA[f"layers.0.{name}.weight"])]
        for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert sizes == {
        "attention.qkv": [(8, 8), (4, 8), (4, 8)],
        "attention.out": [(8, 8)],
        "mlp.up": [(12, 8), (12, 8)],
        "mlp.down": [(8, 12)],
    }
    others = [t.name for t in LLAMA if not matrices(t)]
    assert "embedding.token" in others and all("norm" in name for name in others[1:]), others
    for tensor in LLAMA:  # they tile their tensor
        count = torch.zeros(tensor.shape)
        for matrix in matrices(tensor):
            count[matrix.index] += 1
            assert count[matrix.index].numel() == matrix.rows * matrix.columns
        assert not matrices(tensor) or (count == 1).all()


def test_singular_values_come_near_one_at_any_length():
    torch.manual_seed(2)
    for shape in ((5, 9), (9, 5), (6, 6)):
        matrix = torch.randn(shape)
        update = orthogonalised(matrix, iteration=torch.float32)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.4 and values.max() < 1.4, values
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.dot((left @ right).flatten(), update.flatten()) > 0.7 * min(shape)
        short = orthogonalised(matrix * 1e-12, iteration=torch.float32)
        torch.testing.assert_close(short, update, rtol=1e-4, atol=1e-4)
        assert (orthogonalised(torch.zeros(shape), iteration=torch.float32) == 0).all()


def _optimizer(parameter, tensor, young=None):
    group = {
        "params": [parameter], "lr_factor": 0.5, "weight_decay": DECAY, "eps": 1e-8,
        "orthogonal": True,
    }  # fmt: skip
    optimizer = BlockMuon([group], betas=(0.9, 0.95), momentum=MOMENTUM, iteration=parameter.dtype)
    optimizer.make_state([parameter], step=0, moments=lambda _: ["exp_avg"])
    shared = SharedTensor(tensor.shape, matrices(tensor), ((whole(tensor.shape), 0),), young)
    optimizer.set_matrices({parameter: [shared]}, collect=lambda values: None)
    optimizer.set_learning_rate(2 * LR)
    return optimizer


def _deepspeeds(start, gradients, tensor):
    """Each matrix as a separate parameter, by DeepSpeed's `muon_update`."""
    result = start.clone()
    for matrix in matrices(tensor):
        shape = matrix.rows, matrix.columns
        p = start[matrix.index].reshape(shape).clone()
        momentum = torch.zeros_like(p)
        for gradient in gradients:
            g = gradient[matrix.index].reshape(shape).clone()
            with torch.compiler.set_stance("force_eager"):
                update = original_muon.muon_update(g, momentum, beta=MOMENTUM)
            p = p * (1 - LR * DECAY) - LR * update
        result[matrix.index] = p.view(result[matrix.index].shape)
    return result


@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "mlp.up"])
@pytest.mark.usefixtures("in_double_precision")
def test_the_update_is_deepspeeds(name):
    torch.manual_seed(0)
    tensor = LLAMA[f"layers.0.{name}.weight"]
    start = torch.randn(tensor.shape, dtype=torch.float64)
    gradients = [torch.randn_like(start) for _ in range(4)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = _optimizer(parameter, tensor)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = _deepspeeds(start, gradients, tensor)
    # DeepSpeed's divides by the norm + 1e-7 once more.
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    state = optimizer.state[parameter]
    assert state["step"] == 4 and set(state) == {"step", "exp_avg"}


@pytest.mark.usefixtures("in_double_precision")
def test_young_parts_of_an_update_have_a_rate_of_their_own():
    torch.manual_seed(1)
    tensor = LLAMA["layers.0.mlp.down.weight"]
    young = YoungBlocks(kept=((0, 1, 4), (0, 2, 6)), born=0, peak=1.3, rewarm=3)
    start = torch.randn(tensor.shape, dtype=torch.float64)
    gradient = torch.randn_like(start)
    moved = []
    for blocks in (None, young):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = _optimizer(parameter, tensor, blocks)
        parameter.grad = gradient.clone()
        optimizer.step()
        moved.append(parameter.detach() - start)
    ratio = torch.full(tensor.shape, young.lr_factor(1), dtype=torch.float64)
    ratio[:4, :11:2] = 1.0
    torch.testing.assert_close(moved[1], moved[0] * ratio, rtol=1e-9, atol=1e-12)
    assert young.lr_factor(1) > 1.05


def _story(layout, target, **options):
    return [("train", 4), ("grow", "depth_stack", "copy", 2, target), ("train", 4)], {
        "layout": layout,
        **MUON,
        **options,
    }


def test_every_layout_has_the_loss_curve_of_one_process():
    expected = run_ranks(1, play_all, [_story(Layout(), Layout())])[0][0][0]
    assert expected[3] < expected[0]
    layouts = data_layouts(2) + model_layouts(2)
    stories = [_story(a, b) for a, b in zip(layouts, layouts[3:] + layouts[:3], strict=True)]
    stories += [_story(layout, layout, offload="cpu") for layout in data_layouts(2)[2:]]
    for losses, *_ in run_ranks(2, play_all, stories)[0]:
        np.testing.assert_allclose(losses, expected, rtol=5e-4)


def test_sixteen_bits_follow_thirty_two():
    stories = [
        ([("train", 6)], {"layout": Layout(data=2, zero=zero), "precision": precision, **MUON})
        for precision in ({}, {"dtype": "bf16"}, {"dtype": "fp16", "initial_scale_power": 8})
        for zero in (0, 1, 3)
    ]
    expected, *rest = (losses for losses, *_ in run_ranks(2, play_all, stories)[0])
    for losses in rest:
        np.testing.assert_allclose(losses, expected, rtol=2e-2)
    assert expected[-1] < 0.97 * expected[0]


def _young(comm):
    """Width growth, whose new blocks re-warm: the same under ZeRO as in one piece."""
    found = []
    for layout, target in (
        (Layout(data=2), Layout(data=2)),
        (Layout(data=2, zero=1), Layout(tensor=2)),
        (Layout(tensor=2), Layout(data=2, zero=3)),
    ):
        job = Job(comm, layout=layout, **MUON)
        job.train(4)
        job.grow("width", "sparkling", 2, target)
        job.train(5)
        found.append(job.losses)
    return found


def test_young_blocks_train_in_every_layout():
    first, *others = run_ranks(2, _young)[0]
    for losses in others:
        np.testing.assert_allclose(losses, first, rtol=5e-4)
    assert max(first[4:]) < first[3] * 1.02 and first[-1] < first[4]


def _commute(comm):
    faults = []
    for operator, policy in (("width", "exact"), ("width", "sparkling"), ("depth_stack", "copy")):
        job = Job(comm, layout=Layout(data=2, zero=1), fresh=False, **MUON)
        state, model = job.load(seed=4), job.model
        job.grow(operator, policy, 2, Layout(tensor=2))
        expected = grow(model, state, operator=operator, policy=policy, factor=2, seed=SEED)[2]
        faults.append(job.fault(expected))
        kept = [set(state) - {"step"} for state in job.engine._optimizer.state.values()]
        assert {"exp_avg"} in kept and {"exp_avg", "exp_avg_sq"} in kept
    return faults


def test_its_slots_grow_as_the_gradient_does():
    assert run_ranks(2, _commute) == [[None] * 3] * 2


def _retrace(comm):
    small, large = Job(comm, grad_clip=0.0, **MUON), Job(comm, grad_clip=0.0, **MUON)
    small.train(8)
    large.train(4)
    large.grow("width", "exact", 2, Layout())
    large.train(4)
    return small.losses, large.losses


def test_exact_growth_retraces_the_small_run():
    small, large = run_ranks(1, _retrace)[0]
    np.testing.assert_allclose(large, small, rtol=5e-4)
