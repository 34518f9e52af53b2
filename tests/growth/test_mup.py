"""muP as a property of the model: sizes of activations, rates by shape, growths between shapes."""

import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.optimizer_rules import Factors, OptimizerRules, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS, Init, Rates
from megagrow.state.fresh import fresh
from megagrow.state.parts import part_of
from megagrow.transfer.whole_state import MemoryState
from tests.growth.trained import Run, moved_by_one_update
from tests.toys import (
    FAMILIES,
    build,
    grow,
    mapped,
    random_state,
    token_batches,
    toy_model,
    toy_models,
)

BASE = {"hidden": 4, "layers": 1}  # of the toys' hidden 8, layers 2
MODELS = [model.model_copy(update={"mup": toy_model(mup=BASE).mup}) for _, model in toy_models()]


# --- the coordinate check -----------------------------------------------------------------


def fresh_state(model):
    catalog = build_catalog(model)
    state = MemoryState.empty(catalog, ADAM_SLOTS, dtype=torch.float32)
    for (name, slot), values in state.tensors.items():
        values.zero_()
        if slot == "master":
            shape = catalog[name].shape
            values.copy_(torch.from_numpy(fresh(catalog[name], whole(shape), seed=1)))
    return state


def moved(model, *, muon=False):
    """Root mean squares of what four steps change: activations by their module, and logits."""
    run = Run(model, fresh_state(model), rules=OptimizerRules(), step=0, muon=muon)
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=1)[0][:, :-1])
    found = {}

    def look():
        seen, hooks = {}, []
        for name, module in run.module.named_modules():
            if name.endswith((".qkv", ".out", ".up", ".down")):

                def note(_, __, out, name=name):
                    seen[name] = out[0] if isinstance(out, tuple) else out

                hooks.append(module.register_forward_hook(note))
        with torch.no_grad():
            seen["logits"] = run.module.logits(tokens)
        for hook in hooks:
            hook.remove()
        return seen

    before = look()
    run.losses(token_batches(model, samples=8, seed=2, steps=4))
    for name, values in look().items():
        found[name] = float((values - before[name]).pow(2).mean().sqrt())
    return found


def ends(models, **options):
    """By coordinate: its change in the largest model over that in the smallest."""
    small, large = (moved(model, **options) for model in models)
    common = [name for name in small if name in large]
    assert len(common) > 4 and "logits" in common
    return {name: large[name] / small[name] for name in common}


def wide(hidden, family, *, mup, tied=False):
    return toy_model(
        family=family, tie_embeddings=tied, hidden=hidden, heads=hidden // 16, ffn=2 * hidden,
        sequence=16, vocab=64, init_std={"embedding": 0.5, "matrices": "fan_in"},
        mup={"hidden": 64} if mup else None,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_move_as_far_at_every_width(family, tied):
    """Yang et al., arXiv 2203.03466, section D.1: over widths 64 to 512."""
    kept = ends([wide(h, family, mup=True, tied=tied) for h in (64, 512)])
    # The random part of initial logits falls with the width, and so does what is unlearned.
    assert 0.3 < kept.pop("logits") < 1.2
    assert all(0.4 < ratio < 2.0 for ratio in kept.values()), kept
    for hidden in (128, 256):
        between = ends([wide(h, family, mup=True, tied=tied) for h in (64, hidden)])
        between.pop("logits")
        assert all(0.4 < ratio < 2.0 for ratio in between.values()), between
    plain = ends([wide(h, family, mup=False, tied=tied) for h in (64, 512)])
    assert plain["logits"] > 4
    assert max(plain.values()) > 5 and all(ratio > 2.2 for ratio in plain.values()), plain


def deep(layers, family, *, mup):
    return toy_model(
        family=family, tie_embeddings=False, hidden=32, heads=2, ffn=64, layers=layers, vocab=64,
        sequence=16, init_std={"embedding": 0.5, "matrices": "fan_in"},
        mup={"hidden": 32, "layers": 2} if mup else None,
    )  # fmt: skip


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_writes_falls_as_blocks_become_more(family, muon):
    """CompleteP, arXiv 2505.01618: their sum changes equally at every depth, here 2 to 16."""

    def first_of(mup):
        ratios = ends([deep(n, family, mup=mup) for n in (2, 16)], muon=muon)
        return [8 * ratios[name] for name in ("layers.1.mlp.down", "layers.1.attention.out")]

    assert all(0.6 < ratio < 1.6 for ratio in first_of(True))
    assert all(ratio > 2.5 for ratio in first_of(False))


@pytest.mark.parametrize("family", FAMILIES)
def test_under_muon_the_head_follows_the_width_and_matrices_need_nothing(family):
    kept = ends([wide(h, family, mup=True) for h in (64, 256)], muon=True)
    plain = ends([wide(h, family, mup=False) for h in (64, 256)], muon=True)
    assert plain.pop("logits") > 2 > 1.2 > kept.pop("logits") > 0.5
    assert all(0.7 < ratio < 1.4 for ratio in (*kept.values(), *plain.values()))


# --- rates and initialisation by the shape ------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rates_and_initialisation_of_a_shape(tied):
    base = {"hidden": 4, "heads": 1, "ffn": 4, "layers": 1}  # the model has 8, 2, 12 and 2
    catalog = build_catalog(toy_model(mup=base, tie_embeddings=tied))
    plain = build_catalog(toy_model(tie_embeddings=tied))
    block = "layers.1"
    wanted = {
        "embedding.token": Rates(1, 1 / 2),
        "embedding.position": Rates(1, 1 / 2),
        f"{block}.attention.norm.weight": Rates(1, 1 / 4),
        f"{block}.mlp.norm.bias": Rates(1, 1 / 4),
        f"{block}.attention.qkv.weight": Rates(1 / 2, 1 / 4),
        f"{block}.attention.qkv.bias": Rates(1, 1 / 4),
        f"{block}.attention.out.weight": Rates(1 / 4, 1 / 2, 1 / 2),
        f"{block}.mlp.up.weight": Rates(1 / 2, 1 / 6),
        f"{block}.mlp.up.bias": Rates(1, 1 / 6),
        f"{block}.mlp.down.weight": Rates(1 / 6, 1 / 2, 1 / 2),
        f"{block}.mlp.down.bias": Rates(1 / 2, 1 / 2),
        "final_norm.weight": Rates(1 / 2),
        "final_norm.bias": Rates(1 / 2),
    }
    for name, rates in wanted.items():
        assert catalog[name].rates == rates, name
    assert catalog["final_norm.weight"].init == Init("constant", 1 / 2)
    stds = {
        "embedding.token": 1, f"{block}.attention.qkv.weight": 2**-0.5,
        # At the base: 1 / sqrt(2 layers); the model has more writers by the ratio of depths.
        f"{block}.attention.out.weight": 2**-0.5 * 2**0.5 / 2,
        f"{block}.mlp.down.weight": 3**-0.5 * 2**0.5 / 2,
    }  # fmt: skip
    if not tied:
        assert catalog["output.weight"].rates == Rates(1, 1 / 2)
        stds["output.weight"] = 1
    for name, ratio in stds.items():
        assert catalog[name].init.std == pytest.approx(plain[name].init.std * ratio), name
    keys = group_keys(catalog, OptimizerRules({"embedding.token": Factors(lr=0.1)}))
    assert keys["embedding.token"] == (False, 0.1, 1.0, 0.5, False)
    # Weight decay is divided by the rate: the decay per step is the same at every width.
    assert all(key[1] * key[2] == pytest.approx(1.0 if name != "embedding.token" else 0.1)
               for name, key in keys.items())  # fmt: skip


def test_the_base_shape_itself_is_a_plain_model():
    for _, plain in toy_models():
        at_base = plain.model_copy(
            update={"mup": toy_model(mup={"hidden": plain.hidden, "layers": plain.layers}).mup}
        )
        assert build_catalog(at_base) == build_catalog(plain)


def test_a_base_shape_is_kept_whole_through_growths():
    model = toy_model(mup={"hidden": 4})
    assert model.mup.model_dump() == {"hidden": 4, "heads": 1.0, "ffn": 6.0, "layers": None}
    grown, _ = plan_growth(GrowConfig(operator="width", target={"ffn": 24}), model)
    assert grown.mup == model.mup
    assert build_catalog(grown)["layers.0.mlp.down.weight"].rates.lr == 1 / 4
    assert build_catalog(grown)["layers.0.mlp.up.weight"].rates.lr == 1 / 2


# --- growths ------------------------------------------------------------------------------


GROWTHS = [
    {"operator": "width"}, {"operator": "width", "factor": 3}, {"operator": "width_split"},
    {"operator": "width_random"}, {"operator": "width_fresh", "target": {"hidden": 12}},
    {"operator": "depth_stack"}, {"operator": "width+depth_identity"},
    {"operator": "width", "target": {"ffn": 36}}, {"operator": "width", "target": {"hidden": 16}},
]  # fmt: skip


@pytest.mark.parametrize("section", GROWTHS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("model", MODELS, ids=[name for name, _ in toy_models()])
def test_a_grown_model_has_the_rates_of_a_fresh_one_of_its_shape(model, section):
    grown, growth = plan_growth(GrowConfig(state_policy="kept", **section), model)
    rules = growth.rules_after(OptimizerRules(), step=7)
    sizes = ("family", "layers", "hidden", "heads", "head_dim", "ffn", "sequence", "vocab",
             "tie_embeddings", "init_std")  # fmt: skip
    other = toy_model(**{key: getattr(grown, key) for key in sizes}, mup=model.mup)
    assert not rules.factors
    assert group_keys(growth.target, rules) == group_keys(build_catalog(other), OptimizerRules())
    before, after = build_catalog(model), growth.target
    first = "layers.0.mlp.up.weight"
    assert after[first].rates.lr / before[first].rates.lr == model.hidden / grown.hidden


@pytest.mark.parametrize("operator", [o.name for o in OPERATORS.values() if "exact" in o.policies])
@pytest.mark.parametrize("model", MODELS, ids=[name for name, _ in toy_models()])
def test_exact_asks_for_the_rates_of_the_shape(model, operator):
    """A run that retraces the small one is one whose rates follow muP (arXiv 2602.10545)."""
    uneven = [{"target": {"ffn": 24}}, {"target": {"hidden": 16}}]  # copies read all copies
    for extent in ({"factor": 2}, {"factor": 3}, *(uneven if operator == "width" else ())):
        section = GrowConfig(operator=operator, state_policy="exact", **extent)
        _, growth = plan_growth(section, model)
        rules = growth.rules_after(OptimizerRules(), step=7)
        if operator == "width":  # except Muon's, where the aspect ratio of matrices changes
            left = {(f.lr, f.weight_decay, f.eps) for f in rules.factors.values()}
            assert left <= {(1.0, 1.0, 1.0)} and (not left or extent in uneven)
        plain = plan_growth(section, model.model_copy(update={"mup": None}))[1]
        wanted = plain.rules_after(OptimizerRules(), step=7)
        before = build_catalog(model)
        for tensor in growth.target:
            ours, theirs = rules.factors_of(tensor.name), wanted.factors_of(tensor.name)
            own, old = tensor.rates, before[tensor.name].rates
            assert ours.lr * own.lr / old.lr == pytest.approx(theirs.lr)
            assert ours.weight_decay * old.lr / own.lr == pytest.approx(theirs.weight_decay)
            assert ours.eps * own.eps / old.eps == pytest.approx(theirs.eps)


@pytest.mark.parametrize("model", MODELS, ids=[name for name, _ in toy_models()])
def test_exact_retraces_the_small_run_under_mup(model):
    state = random_state(build_catalog(model), seed=4)
    small = Run(model, state, rules=OptimizerRules(), step=5)
    large, _ = small.grown(operator="width", factor=2, policy="exact")
    future = token_batches(model, samples=4, seed=6, steps=20)
    expected = small.losses(future)
    assert abs(large.losses(future) - expected).max() <= 1e-9


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("model", MODELS, ids=[name for name, _ in toy_models()])
def test_after_a_growth_one_update_of_any_tensor_moves_the_logits_as_far_as_before(model, factor):
    state = random_state(build_catalog(model), seed=4)
    large, growth, grown = grow(model, state, operator="width", policy="kept", factor=factor)
    small = moved_by_one_update(model, state, lambda name: growth.small[name].rates.lr)
    found = moved_by_one_update(large, grown, lambda name: growth.target[name].rates.lr)
    ratios = {name: found[name] / small[name] for name in found if small[name] > 1e-12}
    assert len(ratios) >= len(small) - 2  # the keys' biases move nothing
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=1e-6)


# `head_dim` is an error, and a ramp preserves the loss by its mask.
LOSS_KEPT = [
    pytest.param(model, operator.name, id=f"{name}-{operator.name}")
    for model, (name, _) in zip(MODELS, toy_models(), strict=True)
    for operator in OPERATORS.values()
    if operator.keeps == "loss" and not operator.ramp and operator.name != "head_dim"
    if model.tie_embeddings or operator.name != "untie"
]


@pytest.mark.parametrize("base", [4, 8, 16])
@pytest.mark.parametrize(("model", "operator"), LOSS_KEPT)
def test_what_keeps_the_loss_keeps_it_under_mup(model, operator, base):
    """For any initial value of the final norm: below, at and above the base shape."""
    model = model.model_copy(update={"mup": model.mup.model_copy(update={"hidden": base})})
    state = random_state(build_catalog(model), seed=4)
    large, growth = plan_growth(GrowConfig(operator=operator), model)
    grown = mapped(growth, growth.small, state)
    tokens = torch.from_numpy(token_batches(model, samples=2, seed=1)[0][:, :-1])
    with torch.no_grad():
        before, after = build(model, state).logits(tokens), build(large, grown).logits(tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


def test_what_does_not_go_with_it_is_refused():
    model = MODELS[0]
    with pytest.raises(GrowthError, match=r"(?s)grow\.mup.*follow from the shape.*leave grow\.mup"):
        plan_growth(GrowConfig(operator="width", mup=True), model)
    with pytest.raises(GrowthError, match=r"(?s)model\.mup: wider heads.*head_dim 4 -> 8"):
        plan_growth(GrowConfig(operator="head_dim"), model)


def test_a_model_with_mup_computes_what_the_same_tensors_do_without():
    """There is no multiplier in the forward pass: an export is a plain model."""
    model = MODELS[0]
    state = random_state(build_catalog(model), seed=3)
    tokens = torch.from_numpy(token_batches(model, samples=2, seed=1)[0][:, :-1])
    plain = model.model_copy(update={"mup": None})
    with torch.no_grad():
        assert torch.equal(build(model, state).logits(tokens), build(plain, state).logits(tokens))


def test_parts_have_the_rates_of_their_kind():
    """By role: corresponding tensors of two families have the same rates."""
    found = {}
    for model in MODELS:
        for tensor in build_catalog(model):
            if part_of(tensor) != "vector":
                found.setdefault((part_of(tensor), tensor.axes[-1]), set()).add(tensor.rates)
    assert all(len(rates) == 1 for rates in found.values()), found
