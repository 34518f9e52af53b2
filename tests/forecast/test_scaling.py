"""Published laws, the closed-form growth rule, fits, and the planner."""

import math

import numpy as np
import pytest

from megagrow.config import ModelConfig
from megagrow.errors import ConfigError, DataError
from megagrow.forecast import planner
from megagrow.forecast.fit import Curve, binned, fit_curve, fit_law
from megagrow.forecast.scaling import (
    CHINCHILLA,
    EPOCH,
    KAPLAN,
    PUBLISHED,
    critical_batch,
    find_law,
    when_to_grow,
    when_to_grow_at_critical_batch,
)

MODEL = ModelConfig(layers=24, hidden=1536, heads=16, ffn=6144, sequence=1024, vocab=50257)


# --- laws ---------------------------------------------------------------------------------


def test_published_curves():
    """The formulas of the papers, written out with their constants."""
    n, s = 1.5e9, 2.0e5
    assert KAPLAN.loss(n, s) == pytest.approx((8.8e13 / n) ** 0.076 + (4.2e3 / s) ** 0.76)
    n, d = 7e10, 1.4e12
    chinchilla = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    assert CHINCHILLA.loss(n, d) == pytest.approx(chinchilla)
    # Hoffmann et al. give their own model's predicted loss as 1.94 in round numbers.
    assert chinchilla == pytest.approx(1.936, abs=2e-3)
    assert EPOCH.loss(n, d) == pytest.approx(1.817 + 482.0 / n**0.348 + 2085.4 / d**0.366)
    assert critical_batch(3.0) == pytest.approx(2.1e8 / 3.0 ** (1 / 0.21))


@pytest.mark.parametrize("law", PUBLISHED.values(), ids=PUBLISHED)
def test_duration_is_the_inverse_of_loss(law):
    for s in (1e4, 1e6, 1e9):
        assert law.duration(1e8, law.loss(1e8, s)) == pytest.approx(s, rel=1e-6)
    assert law.duration(1e8, law.limit(1e8)) == math.inf


@pytest.mark.parametrize("law", PUBLISHED.values(), ids=PUBLISHED)
def test_a_size_is_the_best_for_its_compute_at_its_optimal_loss(law):
    n = 2e8
    compute = n * law.duration(n, law.optimal_loss(n))
    best = law.loss(n, compute / n)
    assert all(law.loss(n * f, compute / (n * f)) > best for f in (0.9, 0.99, 1.01, 1.1))


def test_unknown_law():
    with pytest.raises(ConfigError, match=r"kaplan, chinchilla, epoch"):
        find_law("moore")


# --- when to grow -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "ratio", "saving"), [(2, 1.48, 0.098), (4, 2.20, 0.137), (8, 3.26, 0.147)]
)
@pytest.mark.parametrize("n", [1e7, 1e10])
def test_the_marginal_rule_in_closed_form(g, ratio, saving, n):
    found = when_to_grow(KAPLAN, n, g * n)
    assert found.ratio == pytest.approx(ratio, abs=0.005)
    assert found.saving == pytest.approx(saving, abs=0.0006)
    # Both reduce the loss equally per FLOP there, with compute N S.
    step = 1e-6
    costs = [
        n * (KAPLAN.duration(n, found.loss - step) - KAPLAN.duration(n, found.loss))
        for n in (n, g * n)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)
    steps = KAPLAN.duration(n, found.loss) / KAPLAN.duration(g * n, found.loss)
    assert steps == pytest.approx(found.ratio)


@pytest.mark.parametrize(
    ("g", "ratio", "slope"), [(2, 1.58, -0.060), (4, 2.49, -0.052), (8, 3.92, -0.044)]
)
def test_the_marginal_rule_at_the_critical_batch(g, ratio, slope):
    found = when_to_grow_at_critical_batch(KAPLAN, 1e8, g * 1e8)
    assert found.ratio == pytest.approx(ratio, abs=0.005)
    assert found.slope == pytest.approx(slope, abs=0.0005)


def test_the_papers_stopping_slope_is_kaplans():
    """-0.052 is -1 / (1/a_N + 1/a_S + 1/a_B), the slope of a model at its optimal loss."""
    loss = KAPLAN.optimal_loss(1e8)
    slope = -1 / (1 / 0.21 + loss / (0.76 * (loss - KAPLAN.limit(1e8))))
    assert slope == pytest.approx(-0.052, abs=1e-4)


# --- fits ---------------------------------------------------------------------------------


def noisy_runs(law, *, sizes, longest, seed, noise=0.01):
    random = np.random.default_rng(seed)
    runs = []
    for n in sizes:
        s = np.geomspace(longest / 300, longest, 200)
        exact = np.array([law.loss(n, x) for x in s])
        runs.append(binned(n, s, exact * np.exp(random.normal(0, noise, len(s)))))
    return runs


@pytest.mark.parametrize(
    ("law", "longest"), [(CHINCHILLA, 1e11), (KAPLAN, 3e5)], ids=["chinchilla", "kaplan"]
)
def test_fits_recover_constants_within_their_intervals(law, longest):
    runs = noisy_runs(law, sizes=(1e7, 4e7, 1.6e8, 6.4e8, 2.5e9), longest=longest, seed=5)
    fit = fit_law(runs, unit=law.unit, floor=law.floor > 0, bootstrap=60)
    for name in ("n_power", "s_power", "floor"):
        low, high = fit.interval(name)
        assert low <= getattr(law, name) <= high, name
        if name != "floor":
            assert high - low < 0.1 * getattr(law, name)  # a meaningful interval
    assert fit.error < 0.005
    # The use case: extrapolation to ten times the size and the length.
    assert fit.law.loss(2.5e10, 10 * longest) == pytest.approx(
        law.loss(2.5e10, 10 * longest), rel=0.01
    )


def test_too_few_sizes_are_refused():
    runs = noisy_runs(CHINCHILLA, sizes=(1e7, 1e8), longest=1e10, seed=0)
    with pytest.raises(DataError, match="2 sizes"):
        fit_law(runs, unit="tokens")
    assert fit_law(runs, unit="tokens", floor=False, bootstrap=0).law.floor == 0.0


def test_a_single_curve():
    wanted = Curve(capacity=1.2, s_scale=3e5, s_power=0.4)
    s = np.geomspace(1e5, 1e8, 30)
    found = fit_curve(s, [wanted.loss(x, floor=1.5) for x in s], floor=1.5)
    assert found == pytest.approx(wanted, rel=1e-3)
    step = 1e-6 * s[9]
    slope = (wanted.loss(s[9] - step, floor=1.5) - wanted.loss(s[9] + step, floor=1.5)) / (2 * step)
    rest = wanted.loss(s[9], floor=1.5) - 1.5 - wanted.capacity
    assert wanted.gain(rest) == pytest.approx(slope, rel=1e-4)


# --- the planner --------------------------------------------------------------------------


def proportional(size):
    """A size with 6 N FLOPs per token, as in the closed form."""
    return planner.Size(size.model, size.depth, size.width, size.n, 6 * size.n)


def test_one_growth_is_the_closed_form():
    curves = planner.Curves(KAPLAN, batch_tokens=1000)
    sizes = [
        proportional(s) for s in planner.sizes_towards(MODEL, KAPLAN, operators=["depth_stack"])
    ]
    small, large = sizes[-2:]
    assert (small.depth, large.depth) == (2, 1)
    wanted = when_to_grow(KAPLAN, small.n, large.n)
    found = planner.best_growth(curves, small, large, added_loss=0.0)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
    budget = curves.flops(large, KAPLAN.optimal_loss(large.n))
    best = planner.plan_schedule(curves, [small, large], flops=budget, most_stages=2)
    assert [stage.size.depth for stage in best.stages] == [2, 1]
    assert best.stages[-1].end_flops == pytest.approx(budget)
    # At the same final compute the saving is a little more than at the same final loss.
    whole = curves.flops(large, best.loss)
    assert best.saving == pytest.approx(found.gain / whole, rel=1e-3)
    assert best.loss < curves.loss_at(large, budget / large.flops_per_token)


def test_no_other_moment_is_better():
    curves = planner.Curves(CHINCHILLA, batch_tokens=1000)
    sizes = planner.sizes_towards(MODEL, CHINCHILLA, operators=["depth_stack", "width"])
    budget = curves.flops(sizes[-1], CHINCHILLA.optimal_loss(sizes[-1].n))
    best = planner.plan_schedule(curves, sizes, flops=budget, most_stages=3)
    assert len(best.stages) == 3
    moved = planner.predict(curves, best)
    assert moved.loss == pytest.approx(best.loss, rel=1e-9)
    for scale in (0.8, 1.25):
        first = best.stages[0]
        shift = (scale - 1) * first.end_tokens
        stages = [planner.PlannedStage(first.size, 0, first.end_tokens + shift, 0)]
        flops = shift * first.size.flops_per_token
        for stage in best.stages[1:-1]:
            stages.append(planner.PlannedStage(stage.size, 0, stage.end_tokens + shift, 0))
        last = best.stages[-1]
        tokens = last.end_tokens + shift - flops / last.size.flops_per_token
        stages.append(planner.PlannedStage(last.size, 0, tokens, 0))
        other = planner.predict(curves, planner.Schedule(tuple(stages), 0, 0))
        assert other.stages[-1].end_flops == pytest.approx(budget)
        assert other.loss > best.loss


def test_added_loss_costs():
    curves = planner.Curves(CHINCHILLA, batch_tokens=1000)
    sizes = planner.sizes_towards(MODEL, CHINCHILLA, operators=["depth_stack"])
    budget = curves.flops(sizes[-1], CHINCHILLA.optimal_loss(sizes[-1].n))
    losses = [
        planner.plan_schedule(curves, sizes, flops=budget, added_loss=added).loss
        for added in (0.0, 0.02, 10.0)
    ]
    scratch = curves.loss_at(sizes[-1], budget / sizes[-1].flops_per_token)
    assert losses[0] < losses[1] < losses[2] == pytest.approx(scratch)


def test_sizes_are_what_the_operators_grow_from():
    from megagrow.config import GrowConfig
    from megagrow.growth.plan import plan_growth

    target = ModelConfig(layers=6, hidden=24, heads=4, ffn=48, sequence=8, vocab=32)
    sizes = planner.sizes_towards(target, KAPLAN, operators=["depth_stack", "width"])
    assert len(sizes) == 4 * 3  # 1, 2, 3, 6 times as deep; 1, 2, 4 times as wide
    for size in sizes:
        model = size.model
        if size.width > 1:
            model, _ = plan_growth(GrowConfig(operator="width", factor=size.width), model)
        if size.depth > 1:
            model, _ = plan_growth(GrowConfig(operator="depth_stack", factor=size.depth), model)
        assert model == target
