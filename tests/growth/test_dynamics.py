"""Laws 5 and 10: `exact` retraces the small run; twins separate only with a symmetry breaker."""

from dataclasses import replace

import numpy as np
import pytest

from megagrow.config import GrowConfig
from megagrow.growth.optimizer_rules import Factors, OptimizerRules
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from tests.growth.models import MODELS
from tests.growth.trained import Run, moved_by_one_update
from tests.toys import grow, random_state, token_batches

BORN, STEPS = 5, 20
NOT_GROUPED = [name for name in MODELS if "grouped" not in name]
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
exact_operators = pytest.mark.parametrize(
    ("operator", "factor"),
    [(o.name, k) for o in OPERATORS.values() if "exact" in o.policies for k in (2, 3)],
)


def _start(model):
    """A run a few steps after its start, so that its moments are meaningful."""
    state = random_state(build_catalog(model), seed=4)
    for (_, slot), values in state.tensors.items():
        if slot != "master":
            values.zero_()
    run = Run(model, state, rules=OptimizerRules(), step=0)
    run.losses(token_batches(model, samples=4, seed=5, steps=BORN))
    return run


def _future(model):
    return token_batches(model, samples=4, seed=6, steps=STEPS)


@every_model
@exact_operators
def test_exact_retraces_the_small_run(operator, factor, model):
    small = _start(model)
    large, _ = small.grown(operator=operator, factor=factor, policy="exact")
    expected = small.losses(_future(model))
    assert np.abs(large.losses(_future(model)) - expected).max() <= 1e-9
    assert np.abs(np.diff(expected)).min() > 1e-6


@exact_operators
def test_exact_retraces_through_two_growths(operator, factor):
    model = MODELS["gpt2-tied"]
    small = _start(model)
    middle, _ = small.grown(operator=operator, factor=2, policy="exact")
    small.losses(_future(model)[:3])
    middle.losses(_future(model)[:3])
    large, _ = middle.grown(operator=operator, factor=factor, policy="exact")
    expected = small.losses(_future(model))
    assert np.abs(large.losses(_future(model)) - expected).max() <= 1e-9


@exact_operators
@pytest.mark.parametrize("without", ["lr", "weight_decay", "eps"])
def test_without_any_one_factor_the_run_departs(operator, factor, without):
    model = MODELS["gpt2-tied"]
    small = _start(model)
    grown, growth, state = grow(
        model, small.state(), operator=operator, factor=factor, policy="exact"
    )
    rules = growth.rules_after(OptimizerRules(), step=BORN)
    assert any(getattr(f, without) != 1.0 for f in rules.factors.values())
    crippled = {name: replace(f, **{without: 1.0}) for name, f in rules.factors.items()}
    large = Run(grown, state, rules=OptimizerRules(crippled), step=BORN)
    expected = small.losses(_future(model))
    assert np.abs(large.losses(_future(model)) - expected).max() > 1e-6


def test_factors_of_the_width_operator():
    model = MODELS["gpt2-untied"]
    growth = grow(
        model, random_state(build_catalog(model), seed=0), operator="width", policy="exact"
    )[1]
    rules = growth.rules_after(OptimizerRules(), step=BORN)
    assert rules.factors_of("layers.1.mlp.up.weight") == Factors(0.5, 2.0, 0.5)
    assert rules.factors_of("final_norm.weight") == Factors(0.5, 2.0, 1.0)
    assert rules.factors_of("embedding.token") == Factors(1.0, 1.0, 0.5)
    assert rules.factors_of("layers.0.attention.norm.weight") == Factors(1.0, 1.0, 0.5)
    assert not rules.young


# --- law 10 -------------------------------------------------------------------------------


def _update_gap(growth, before, after):
    """The largest difference between the updates of two copies of the same elements."""
    gap = 0.0
    for tensor in growth.target:
        first = {}
        moved = after.tensors[tensor.name, "master"] - before.tensors[tensor.name, "master"]
        for block in growth.blocks(tensor):
            copy = block.scaled(1.0)
            piece = moved[copy.target_slices(whole(copy.shape), (0,) * len(block.axes))]
            read = tuple((a.source_start, a.source_step, a.length) for a in block.axes)
            twin = first.setdefault((block.source, read, block.param), piece)
            gap = max(gap, float((piece - twin).abs().max()))
    return gap


def _gap_after(model, *, operator, factor, policy):
    large, growth = _start(model).grown(operator=operator, factor=factor, policy=policy)
    before = large.state()
    assert np.isfinite(large.losses(_future(model))).all()
    assert (large.state().tensors["embedding.token", "master"]
            - before.tensors["embedding.token", "master"]).abs().max() > 1e-3  # fmt: skip
    return _update_gap(growth, before, large.state())


@every_model
@exact_operators
def test_exact_copies_stay_twins(operator, factor, model):
    assert _gap_after(model, operator=operator, factor=factor, policy="exact") <= 1e-12


@every_model
@pytest.mark.parametrize(
    ("operator", "policy"),
    [("width", "copy"), ("width", "reset"), ("width", "shen"), ("width_diag", "shen")],
)
def test_width_alone_has_no_breaker(operator, policy, model):
    """With moments as symmetric as the copies, twins stay identical."""
    assert _gap_after(model, operator=operator, factor=2, policy=policy) <= 1e-12


@pytest.mark.parametrize(
    ("operator", "policy"),
    [
        (name, policy)
        for name in ("width", "width_diag", "width_split", "width_noise", "kv_groups")
        for policy in OPERATORS[name].policies
    ],
)
def test_copies_that_never_part_are_reported_and_no_others(operator, policy):
    """`kv_groups` by its factor duplicates query heads."""
    model = MODELS["llama-untied"]
    _, growth, _ = grow(model, random_state(build_catalog(model), seed=4), operator=operator,
                        policy=policy)  # fmt: skip
    stated = growth.caveats(grad_clip=0.0, dropout=0.0)
    apart = _gap_after(model, operator=operator, factor=2, policy=policy) > 1e-12
    assert len(stated) == (not apart)
    assert all("copies never part" in line and "width_fresh" in line for line in stated)
    # Dropout separates them, since it drops each independently.
    assert not any("never part" in line for line in growth.caveats(grad_clip=0.0, dropout=0.1))


def test_in_a_composition_copies_stay_copies():
    model = MODELS["llama-untied"]
    for operator, policy, said in (
        ("width+depth_stack", "copy", True),
        ("depth_stack+width", "kept", False),
        ("depth_stack+width_fresh", "kept", False),
    ):
        growth = plan_growth(GrowConfig(operator=operator, state_policy=policy), model)[1]
        assert bool(growth.caveats(grad_clip=0.0, dropout=0.0)) == said


BREAKERS = [
    *((o.name, "sparkling", k) for o in OPERATORS.values()
      if o.name.startswith("width") and "no copies" not in o.breaker for k in (2, 3)),
    *((name, "copy", k) for name in ("width_split", "width_noise") for k in (2, 3)),
]  # fmt: skip


@every_model
@pytest.mark.parametrize(("operator", "policy", "factor"), BREAKERS)
def test_a_breaker_parts_the_twins(operator, policy, factor, model):
    assert _gap_after(model, operator=operator, factor=factor, policy=policy) > 1e-6


@pytest.mark.parametrize("operator", ["width", "width_diag"])
def test_the_published_policy_departs_from_the_small_run(operator):
    model = MODELS["gpt2-tied"]
    small = _start(model)
    large, _ = small.grown(operator=operator, factor=2, policy="shen")
    departure = np.abs(large.losses(_future(model)) - small.losses(_future(model)))
    assert departure[0] <= 1e-12  # the loss itself is preserved
    assert departure.max() > 1e-3


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("model", [MODELS[name] for name in NOT_GROUPED], ids=NOT_GROUPED)
def test_under_mup_one_update_of_any_tensor_moves_the_logits_as_far_as_before(model, factor):
    state = random_state(build_catalog(model), seed=4)
    large, growth, grown = grow(model, state, operator="width", policy="kept", factor=factor)
    rules = replace(growth, mup=True).rules_after(OptimizerRules(), step=0)
    small = moved_by_one_update(model, state, lambda name: 1.0)
    found = moved_by_one_update(large, grown, lambda name: rules.factors_of(name).lr)
    assert set(found) == set(small) and "final_norm.weight" in found
    ratios = {name: found[name] / small[name] for name in found if small[name] > 1e-12}
    assert len(ratios) >= len(small) - 2  # the keys' biases move nothing
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=1e-6)
