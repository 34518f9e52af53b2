"""Slots other than Adam's: the gradient law defines them, whatever their names."""

import pytest
import torch

from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.growth.plan import grown_model, make_growth
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.catalog import MASTER, Slot
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.ends import NoChannel
from megagrow.transfer.execute import transfer_between_ranks
from megagrow.transfer.whole_state import MemoryState
from tests.growth.models import MODELS
from tests.toys import build, grow, random_state, token_batches

LION = (MASTER, Slot("exp_avg", "first_moment"))
MUON = (MASTER, Slot("momentum_buffer", "first_moment"))
ADAGRAD = (MASTER, Slot("sum", "second_moment"))
operators = pytest.mark.parametrize("operator", ["width", "width_diag"])
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def _accumulated(model, state, slots, batches):
    """The slots of an optimizer after some steps at fixed parameters."""
    module, kept = build(model, state), {}
    for batch in batches:
        module.zero_grad()
        module(torch.from_numpy(batch)).backward()
        for name, parameter in named_tensors(module).items():
            for slot in slots[1:]:
                gradient = parameter.grad
                if slot.kind == "second_moment":
                    gradient = gradient**2
                before = kept.get((name, slot.name), 0.0)
                kept[name, slot.name] = 0.9 * before + gradient
    return kept


def _mapped(model, state, operator, slots):
    large = grown_model(model, operator=operator, factor=2)
    small, target = build_catalog(model), build_catalog(large)
    growth = make_growth(operator=operator, policy="exact", small=small, target=target)
    new = MemoryState.empty(target, slots, dtype=torch.float64)
    transfer_between_ranks(
        state_map=growth, old=state, old_placement=Placement(small, Layout()), new=new,
        new_placement=Placement(target, Layout()), slots=slots, channel=NoChannel(), seed=0,
        staging_bytes=1 << 20, dtype=torch.float64,
    )  # fmt: skip
    return large, growth, new


@models
@operators
@pytest.mark.parametrize("slots", [LION, MUON, ADAGRAD], ids=["lion", "muon", "adagrad"])
def test_slots_are_what_the_grown_model_would_have_gathered(slots, operator, model):
    state = random_state(build_catalog(model), seed=1)
    batches = token_batches(model, samples=4, seed=2, steps=3)
    state.tensors.update(_accumulated(model, state, slots, batches))
    large, _, new = _mapped(model, state, operator, slots)
    expected = _accumulated(large, new, slots, batches)
    for key, values in expected.items():
        torch.testing.assert_close(new.tensors[key], values, rtol=0, atol=1e-9)


def _lion(model, state, rules, batches, *, lr=1e-3, decay=0.1):
    """Lion (Chen et al., arXiv 2302.06675), by hand; the losses."""
    module, losses = build(model, state), []
    named = named_tensors(module)
    momentum = {name: state.tensors[name, "exp_avg"].clone() for name in named}
    for batch in batches:
        module.zero_grad()
        loss = module(torch.from_numpy(batch))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in named.items():
                f, m = rules.factors_of(name), momentum[name]
                direction = 0.9 * m + 0.1 * p.grad
                direction[direction.abs() < 1e-13] = 0.0  # a key's bias has no gradient at all
                p.mul_(1 - lr * f.lr * decay * f.weight_decay)
                p.sub_(lr * f.lr * direction.sign())
                m.mul_(0.99).add_(p.grad, alpha=0.01)
    return torch.tensor(losses)


@models
@operators
def test_lion_retraces_the_small_run(operator, model):
    state = random_state(build_catalog(model), seed=1)
    start, *batches = token_batches(model, samples=4, seed=2, steps=13)
    state.tensors.update(_accumulated(model, state, LION, [start]))
    large, growth, new = _mapped(model, state, operator, LION)
    rules = growth.rules_after(OptimizerRules(), step=0)
    expected = _lion(model, state, OptimizerRules(), batches)
    found = _lion(large, new, rules, batches)
    assert (found - expected).abs().max() <= 1e-9
    assert expected.diff().abs().min() > 1e-6


def test_muon_turns_the_grown_momentum_into_the_tiled_update():
    """Its update is the scale-invariant polar factor: for tiles it is tiles of 1/k the old one."""
    model = MODELS["llama-tied"]
    state = random_state(build_catalog(model), seed=1)
    _, _, new = grow(model, state, operator="width", policy="exact", factor=2)
    name = "layers.0.mlp.down.weight"

    def polar(matrix):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        rank = torch.linalg.matrix_rank(matrix)
        return u[:, :rank] @ v[:rank]

    old, large = state.tensors[name, "exp_avg"], new.tensors[name, "exp_avg"]
    update = polar(old)
    tiles = torch.cat([update.repeat_interleave(2, dim=1)] * 2) / 2
    torch.testing.assert_close(polar(large), tiles, rtol=0, atol=1e-12)
