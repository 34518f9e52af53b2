"""Training and live growth on one GPU: what holds on a CPU holds there (`make gpu-check`)."""

import itertools

import numpy as np
import pytest
import torch

from megagrow.state.layout import Layout
from tests.engine.plays import growth_faults, play_all
from tests.ranks import run_ranks
from tests.toys import growths, toy_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ZEROS = (0, 1, 2, 3)


def story(first, **options):
    """Train, widen, train, stack, train; each growth stage at another ZeRO stage."""
    second, third = Layout(zero=(first + 1) % 4), Layout(zero=(first + 2) % 4)
    script = [
        ("train", 6),
        ("grow", "width", "sparkling", 2, second),
        ("train", 6),
        ("grow", "depth_stack", "copy", 2, third),
        ("train", 6),
    ]
    return script, {"layout": Layout(zero=first)} | options


def test_a_grown_run_has_the_losses_of_a_cpu():
    ((expected, _, _),) = run_ranks(1, play_all, [story(0)])[0]
    (plays,) = run_ranks(1, play_all, [story(zero) for zero in ZEROS], device="cuda")
    for losses, _, evaluations in plays:
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)


def test_documents_apart_have_the_losses_of_a_cpu():
    """By flex attention's kernels; on a CPU one document after the other."""
    model = toy_model(hidden=32, heads=2, sequence=160, init_std=0.2)
    recomputed = model.model_copy(update={"activation_checkpointing": "full"})
    script = [("train", 6)]
    ((expected, _, _),) = run_ranks(1, play_all, [(script, {"model": model, "eod": 4})])[0]
    plays = [(script, {"model": m, "eod": 4, "layout": Layout(zero=zero)})
             for m, zero in ((model, 0), (model, 3), (recomputed, 1))]  # fmt: skip
    for losses, _, _ in run_ranks(1, play_all, plays, device="cuda")[0]:
        np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_grown_run_in_sixteen_bits(dtype):
    options = {"precision": {"dtype": dtype}}
    plays = [story(zero, **options) for zero in ZEROS]
    for losses, _, evaluations in run_ranks(1, play_all, plays, device="cuda")[0]:
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        assert evaluations[1] == pytest.approx(evaluations[0], rel=2e-2)


def test_live_growth_equals_growing_in_one_process():
    layouts = [Layout(zero=zero) for zero in ZEROS]
    pairs = itertools.product(layouts, layouts)
    # Noise is a sum of products, which a GPU contracts differently.
    noisy = ("width_noise", "width_perturb", "shrink_pad_perturb")
    exact = [g for g in growths() if g[0] not in noisy]
    cases = [(a, b, g) for (a, b), g in zip(pairs, exact[::3], strict=False)]
    (faults,) = run_ranks(1, growth_faults, cases, device="cuda")
    assert not [found for found in zip(cases, faults, strict=True) if found[1]]
