"""Learned maps: they start as the operator's blocks, cover every tensor, and fitting helps."""

import numpy as np
import pytest
import torch

from megagrow.config import BatchConfig, GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.operators.ligo import Maps
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.models.common.documents import Separator
from megagrow.models.transformer import named_tensors
from megagrow.train.fit import fit, fit_growth
from megagrow.transfer.whole_state import MemoryState
from tests.growth.models import MODELS
from tests.toys import build, grow, mapped, random_state, token_batches, toy_model

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
TARGETS = [{"factor": 2}, {"target": {"hidden": 32, "layers": 5}}, {"target": {"ffn": 24}}]


def _parameters(state):
    return {name: values for (name, slot), values in state.tensors.items() if slot == "master"}


@every_model
@pytest.mark.parametrize("extent", TARGETS, ids=str)
def test_maps_begin_as_the_operators_blocks(model, extent):
    small = random_state(build_catalog(model), seed=1)
    large, growth = plan_growth(GrowConfig(operator="ligo", **extent), model)
    expected = _parameters(mapped(growth, build_catalog(model), small))
    found = Maps(growth.small, growth.target).double()(_parameters(small))
    assert list(found) != [] and set(found) == {t.name for t in build_catalog(large)}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=1e-12, msg=name)


@every_model
def test_width_alone_begins_with_the_loss_kept(model):
    state = random_state(build_catalog(model), seed=1)
    large, growth = plan_growth(GrowConfig(operator="ligo", target={"hidden": 16}), model)
    maps = Maps(growth.small, growth.target).double()
    grown = MemoryState({(n, "master"): v for n, v in maps(_parameters(state)).items()})
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        before, after = build(model, state).logits(tokens), build(large, grown).logits(tokens)
    assert (after - before).abs().max() <= 1e-10


@every_model
def test_every_map_is_fitted_as_plain_autograd_would(model):
    """Also where micro-batches share one pass through the maps."""
    state = random_state(build_catalog(model), seed=1, dtype=torch.float32)
    large, growth, start = grow(model, state, operator="ligo")
    batch = token_batches(model, samples=4, seed=3)[0]
    maps, plain = (Maps(growth.small, growth.target) for _ in range(2))
    result = fit(maps, large, _parameters(state), [[batch[:2], batch[2:]]], steps=1, lr=1e-3)
    module = build(large, start)
    loss = module(torch.from_numpy(batch))
    assert loss.item() == pytest.approx(result.losses[0], rel=1e-5)
    loss.backward()
    grown = plain(_parameters(state))
    tensors = named_tensors(module)
    torch.autograd.backward(list(grown.values()), [tensors[name].grad for name in grown])
    after = dict(maps.named_parameters())
    for name, value in plain.named_parameters():
        clear = value.grad.abs() > 1e-3 * value.grad.abs().max()
        assert value.grad.abs().max() > 1e-6, name
        # The first step of Adam is its rate, against the gradient's sign.
        expected = (value - 1e-3 * value.grad.sign())[clear]
        torch.testing.assert_close(after[name][clear], expected, rtol=0, atol=2e-5, msg=name)
    assert result.flops > 0


def test_maps_are_fitted_with_documents_as_the_run_reads_them():
    model = toy_model(init_std=0.4)
    state = random_state(build_catalog(model), seed=1, dtype=torch.float32)
    large, growth, start = grow(model, state, operator="ligo")
    batch = token_batches(model, samples=4, seed=3)[0]
    maps = Maps(growth.small, growth.target)
    result = fit(maps, large, _parameters(state), [[batch]], steps=1, eod=5)
    module = build(large, start)
    packed = module(torch.from_numpy(batch)).item()
    module.separator = Separator(5, frozenset([None]), "each")
    assert module(torch.from_numpy(batch)).item() == pytest.approx(result.losses[0], rel=1e-5)
    assert packed != pytest.approx(result.losses[0], rel=1e-4)


def test_fitting_lowers_the_loss_and_is_the_same_each_time():
    model = toy_model(init_std=0.2)
    state = random_state(build_catalog(model), seed=1, dtype=torch.float32)
    large, growth = plan_growth(GrowConfig(operator="ligo", fit_steps=40), model)

    class Samples:
        eod = None

        def batch(self, start, count):
            rows = np.arange(start, start + count)[:, None] % 3 + np.arange(model.sequence + 1)
            return (rows % model.vocabulary).astype(np.int64)

    def once():
        return fit_growth(
            growth, model=large, small=state, samples=Samples(), first=5,
            batch=BatchConfig(**{"global": 8, "micro": 4}),
        )  # fmt: skip

    (one, done), (other, _) = once(), once()
    assert len(done.losses) == 40 and done.losses[-1] < done.losses[0] - 0.05
    assert all(torch.equal(values, other.tensors[key]) for key, values in one.tensors.items())


def test_a_fitted_operator_stands_alone():
    with pytest.raises(GrowthError, match="is fitted on data and does not go with others"):
        plan_growth(GrowConfig(operator="ligo+vocab"), toy_model())
    with pytest.raises(GrowthError, match=r"set grow\.operator to ligo"):
        plan_growth(GrowConfig(operator="width", fit_steps=3), toy_model())
    with pytest.raises(GrowthError, match=r"set grow\.operator to width_random"):
        plan_growth(GrowConfig(operator="width", ramp=3), toy_model())
