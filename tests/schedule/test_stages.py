import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.load import parse_config
from megagrow.config.schema import LayoutConfig
from megagrow.errors import ConfigError
from megagrow.schedule import resolve_stages, stage_of


def config(*untils, batch=4, sequence=8):
    return parse_config(
        {
            "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": sequence},
            "data": {"path": "d"},
            "batch": {"global": batch, "micro": 1},
            "stages": [{"until": until} for until in untils],
        }
    )


def per_token(index, model):
    """A substitute for the FLOP count: any exact function of the shape."""
    return 100 * model.hidden


def resolve(run, models=None):
    count = len(run.stages)
    return resolve_stages(
        run,
        models=models or [run.model] * count,
        layouts=[LayoutConfig(zero=index % 3) for index in range(count)],
        flops_per_token=per_token,
    )


def test_units_mix_and_stages_join():
    run = config({"steps": 10}, {"tokens": 1000}, {"flops": 2e6})
    wide = run.model.model_copy(update={"hidden": 8, "sequence": 16})
    first, second, third = resolve(run, [run.model, run.model, wide])
    # 4 samples of 8 tokens a step; 400 FLOPs a token
    assert (first.start_step, first.end_step) == (0, 10)
    assert (first.end_tokens, first.end_flops) == (320, 128_000)
    # 680 tokens are missing: 21.25 steps, so 22
    assert (second.start_step, second.end_step) == (10, 32)
    assert (second.start_tokens, second.end_tokens) == (320, 1024)
    assert second.end_flops == 1024 * 400
    # 64 tokens of 800 FLOPs a step; 1,590,400 are missing: 31.06 steps, so 32
    assert (third.start_step, third.end_step) == (32, 64)
    assert third.tokens_per_step == 64
    assert third.flops_per_step == 51_200
    assert third.end_flops == 409_600 + 32 * 51_200
    assert third.model is wide
    assert [plan.layout.zero for plan in (first, second, third)] == [0, 1, 2]
    assert [plan.index for plan in (first, second, third)] == [0, 1, 2]
    assert third.steps == 32


def test_a_bound_that_is_met_exactly_takes_no_further_step():
    (plan,) = resolve(config({"tokens": 3 * 32}))
    assert (plan.end_step, plan.end_tokens) == (3, 96)
    (plan,) = resolve(config({"tokens": 3 * 32 + 0.5}))
    assert plan.end_step == 4


def test_exact_where_floats_are_not():
    bound = 2.0**53 + 2
    (plan,) = resolve(config({"tokens": bound}, batch=1, sequence=1))
    assert plan.end_tokens == 2**53 + 2
    (plan,) = resolve(config({"flops": 3e30}, batch=1, sequence=1))
    assert plan.end_flops - 400 < int(3e30) <= plan.end_flops


@settings(max_examples=100, deadline=None)
@given(
    further=st.lists(
        st.tuples(st.sampled_from(["steps", "tokens", "flops"]), st.integers(1, 10**7)),
        min_size=1,
        max_size=4,
    )
)
def test_every_stage_ends_at_the_first_step_that_reaches_its_bound(further):
    a_step = {"steps": 1, "tokens": 32, "flops": 32 * 400}
    done = dict.fromkeys(a_step, 0)
    untils = []
    ends = []
    for unit, extra in further:
        untils.append({unit: done[unit] + extra})
        steps = math.ceil(Fraction(extra, a_step[unit]))
        done = {key: value + steps * a_step[key] for key, value in done.items()}
        ends.append(done)
    plans = resolve(config(*untils))
    for plan, end in zip(plans, ends, strict=True):
        found = {"steps": plan.end_step, "tokens": plan.end_tokens, "flops": plan.end_flops}
        assert found == end
    for before, after in pairwise(plans):
        assert before.end_step == after.start_step
        assert before.end_tokens == after.start_tokens
        assert before.end_flops == after.start_flops


@pytest.mark.parametrize(
    ("untils", "says"),
    [
        ([{"steps": 10}, {"steps": 10}], ["stages[1].until.steps = 10", "stages[0]", "10 steps"]),
        ([{"steps": 10}, {"steps": 20}, {"tokens": 600}], ["stages[2].until.tokens = 600", "640"]),
        ([{"tokens": 1e6}, {"flops": 2.5}], ["stages[1].until.flops = 2.5", "400,000,000"]),
    ],
)
def test_an_empty_stage_is_refused_with_both_figures(untils, says):
    with pytest.raises(ConfigError) as caught:
        resolve(config(*untils))
    for part in says:
        assert part in str(caught.value)


def test_growths_may_share_a_step():
    """Also the first stage: imported weights may grow before training."""
    run = config({"steps": 0}, {"steps": 0}, {"steps": 5}, {"steps": 5}, {"steps": 7})
    plans = resolve(run)
    assert [(plan.start_step, plan.end_step) for plan in plans] == [
        (0, 0), (0, 0), (0, 5), (5, 5), (5, 7),
    ]  # fmt: skip
    assert [stage_of(plans, step).index for step in range(7)] == [2] * 5 + [4] * 2
    assert [(plan.steps, plan.tokens_per_step) for plan in plans[:2]] == [(0, 32), (0, 32)]
    with pytest.raises(ConfigError, match=r"stages\[0\].until.steps = 0 leaves the stage no step"):
        resolve(config({"steps": 0}))


def test_each_stage_needs_a_model_and_a_layout():
    run = config({"steps": 1}, {"steps": 2})
    with pytest.raises(ValueError, match="2 stages need"):
        resolve(run, [run.model])


def test_stage_of():
    plans = resolve(config({"steps": 3}, {"steps": 5}))
    assert [stage_of(plans, step).index for step in range(5)] == [0, 0, 0, 1, 1]
    for step in (-1, 5):
        with pytest.raises(ValueError, match="steps 0 to 4"):
            stage_of(plans, step)
