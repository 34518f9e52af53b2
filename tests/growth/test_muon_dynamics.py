"""Law 5 under Muon: orthogonalised updates of a grown run retrace the small one's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.optimizers import MUON
from tests.growth.models import MODELS
from tests.growth.trained import Run
from tests.toys import mapped, random_state, token_batches

BORN, STEPS, LR = 5, 20, 2e-3
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _in_double_precision(monkeypatch):
    """DeepSpeed's iteration in the dtype of the law; by itself it takes fp16 or fp32."""
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method="gram": torch.float64)


def _start(model):
    state = random_state(build_catalog(model), seed=4)
    for (_, slot), values in state.tensors.items():
        if slot != "master":
            values.zero_()
    run = Run(model, state, rules=OptimizerRules(), step=0, muon=True, lr=LR)
    run.losses(token_batches(model, samples=4, seed=5, steps=BORN))
    return run


def _future(model):
    return token_batches(model, samples=4, seed=6, steps=STEPS)


@every_model
@pytest.mark.parametrize(("operator", "factor"), [("width", 2), ("width", 3), ("width_diag", 2)])
def test_exact_retraces_the_small_run(operator, factor, model):
    small = _start(model)
    large, _ = small.grown(operator=operator, factor=factor, policy="exact")
    expected = small.losses(_future(model))
    assert np.abs(large.losses(_future(model)) - expected).max() <= 1e-9
    assert np.abs(np.diff(expected)).min() > 1e-6


def _grown(run, target):
    """A run that continues in a model with other sizes, and the growth's rules."""
    model, growth = plan_growth(
        GrowConfig(operator="width", state_policy="exact", target=target), run.model
    )
    rules = growth.rules_after(run.rules, step=run.steps)
    state = mapped(growth, run.catalog, run.state())
    return Run(model, state, rules=rules, step=run.steps, muon=True, lr=LR), rules


def test_exact_retraces_where_one_axis_grows():
    """Rows and columns are then copied unequally often, and the aspect ratios change."""
    small = _start(MODELS["llama-tied"])
    large, rules = _grown(small, {"ffn": 48})
    up, down = (rules.factors_of(f"layers.0.mlp.{name}.weight") for name in ("up", "down"))
    # 12 x 8 becomes 48 x 8: sqrt(4) sqrt(12 / 8) / sqrt(48 / 8); 8 x 12 becomes 8 x 48.
    assert up.orthogonal == pytest.approx(1.0) and up.lr == 1.0
    assert down.orthogonal == pytest.approx(0.5) and down.lr == 0.25
    expected = small.losses(_future(small.model))
    assert np.abs(large.losses(_future(small.model)) - expected).max() <= 1e-9


def test_width_by_one_factor_leaves_the_rate_of_matrices():
    large, growth = _start(MODELS["gpt2-tied"]).grown(operator="width", factor=2, policy="exact")
    keys = group_keys(growth.target, large.rules, MUON)
    assert keys["layers.0.mlp.up.weight"] == (False, 1.0, 1.0, 1.0, True)
    assert keys["embedding.token"] == (False, 1.0, 1.0, 0.5, False)
    assert OptimizerRules.from_json(large.rules.to_json()) == large.rules


def test_adams_factors_would_depart():
    model = MODELS["gpt2-tied"]
    small = _start(model)
    large, _ = small.grown(operator="width", factor=2, policy="exact")
    adams = {name: replace(f, orthogonal=f.lr) for name, f in large.rules.factors.items()}
    wrong = Run(
        large.model, large.state(), rules=OptimizerRules(adams), step=BORN, muon=True, lr=LR
    )
    expected = small.losses(_future(model))
    assert np.abs(wrong.losses(_future(model)) - expected).max() > 1e-4


def test_fused_matrices_that_need_different_rates_are_refused():
    model = MODELS["llama-grouped"]
    sizes = {"hidden": 2 * model.hidden, "heads": 8 * model.heads, "kv_heads": 8 * model.kv_groups}
    config = GrowConfig(operator="width", state_policy="exact", target=sizes)
    _, growth = plan_growth(config, model)
    rules = growth.rules_after(OptimizerRules(), step=0)
    assert rules.factors_of("layers.0.attention.qkv.weight").orthogonal is None
    assert OptimizerRules.from_json(rules.to_json()) == rules
    group_keys(growth.target, rules)  # no problem with AdamW
    with pytest.raises(GrowthError, match=r"(?s)optimizer.name muon.*qkv.*sparkling"):
        group_keys(growth.target, rules, MUON)


def test_sparkling_parts_the_copies_and_trains():
    model = MODELS["gpt2-tied"]
    large, _ = _start(model).grown(operator="width", factor=2, policy="sparkling")
    batch = np.repeat(_future(model)[:1], STEPS, axis=0)
    losses = large.losses(batch)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    weight = large.state().tensors["layers.0.mlp.down.weight", "master"]
    n = weight.shape[0] // 2
    assert (weight[:n] - weight[n:]).abs().max() > 1e-4
