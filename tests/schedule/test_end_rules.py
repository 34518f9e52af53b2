"""The rules that end a stage, on known curves."""

import json

import pytest

from megagrow.forecast.fit import Validated
from megagrow.forecast.scaling import ScalingLaw, when_to_grow
from megagrow.schedule.end_rules import Seen, Sizes, marginal, next_stage, slope

LAW = ScalingLaw("toy", 1.5, 1e7, 0.3, 1e6, 0.5, "tokens", True)
SMALL, LARGE = 1e6, 4e6


def watched(loss_at, tokens):
    return Seen(tuple(Validated(i, int(t), int(6 * SMALL * t), loss_at(t)) for i, t in
                       enumerate(tokens)))  # fmt: skip


def test_slope_of_a_power_law():
    def power(tokens):
        return 20.0 * tokens**-0.07

    seen = watched(power, [10**k for k in range(3, 9)])
    flat = slope(seen, threshold=-0.071, points=5)
    steep = slope(seen, threshold=-0.069, points=5)
    assert flat.inputs["slope"] == pytest.approx(-0.07)
    assert flat.end and not steep.end
    assert slope(seen, threshold=-0.1, points=7) is None  # too few


def first_end(law, sizes):
    """The tokens at which the marginal rule first ends the stage."""
    seen = Seen()
    for i in range(1, 100):
        tokens = i * 4e4
        seen = seen.after(Validated(i, int(tokens), int(tokens), law.loss(SMALL, tokens)))
        decision = marginal(seen, law, sizes, points=6)
        if decision is not None:
            seen = decision.seen
            if decision.end:
                return tokens, decision
    raise AssertionError("never")


def test_marginal_ends_where_the_closed_form_says():
    sizes = Sizes(int(SMALL), int(LARGE), 6 * SMALL, 6 * LARGE)
    tokens, decision = first_end(LAW, sizes)
    wanted = when_to_grow(LAW, SMALL, LARGE)
    assert LAW.loss(SMALL, tokens - 4e4) > wanted.loss >= LAW.loss(SMALL, tokens) - 1e-3
    assert decision.inputs["capacity"] == pytest.approx(LAW.capacity(SMALL), rel=1e-2)
    assert decision.inputs["capacity_after"] == pytest.approx(LAW.capacity(LARGE), rel=1e-2)
    # If the large model is more expensive, growing pays off later.
    later, _ = first_end(LAW, sizes._replace(large_flops=8 * LARGE))
    assert later > tokens


def test_a_grown_model_counts_from_where_its_curve_had_the_loss():
    """The second stage continues the larger curve: its credit is the tokens it has saved."""
    sizes = Sizes(int(SMALL), int(LARGE), 6 * SMALL, 6 * LARGE)
    tokens, decision = first_end(LAW, sizes)
    seen = next_stage(decision.seen, LAW, small=int(SMALL), large=int(LARGE))
    assert seen.validations == () and seen.curve.capacity == pytest.approx(
        LAW.capacity(LARGE), rel=1e-2
    )
    begun = LAW.duration(LARGE, LAW.loss(SMALL, tokens))
    bigger = Sizes(int(LARGE), int(4 * LARGE), 6 * LARGE, 24 * LARGE)
    for i in range(8):
        at = i * 1e6
        seen = seen.after(
            Validated(i, int(tokens + at), int(tokens + at), LAW.loss(LARGE, begun + at))
        )
        decision = marginal(seen, LAW, bigger, points=6)
        seen = seen if decision is None else decision.seen
    assert seen.credit == pytest.approx(begun, rel=0.05)
    assert decision.inputs["s_power"] == pytest.approx(LAW.s_power, rel=0.1)


def test_a_watch_survives_json():
    _, decision = first_end(LAW, Sizes(int(SMALL), int(LARGE), 6 * SMALL, 6 * LARGE))
    for seen in (Seen(), decision.seen):
        assert Seen.from_json(json.loads(json.dumps(seen.to_json()))) == seen
