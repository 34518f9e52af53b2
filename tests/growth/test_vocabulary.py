"""`vocab` with a map of tokens: rows by text, means of pieces, moments, layouts, compositions."""

import random

import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.engine.optimizers.generations import bands, generations
from megagrow.errors import GrowthError
from megagrow.growth.new_blocks import MOST_RUNS
from megagrow.growth.operators.vocabulary import TokenMap
from megagrow.growth.optimizer_rules import OptimizerRules, YoungBlocks, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.execute import transfer_between_ranks
from megagrow.transfer.read_through import Through
from tests.growth.models import MODELS
from tests.toys import ShardState, build, mapped, on_threads, random_state, toy_model

OLD, NEW = 13, 21


def token_map(old=OLD, new=NEW, *, seed=0, dropped=1, fresh=1):
    """Old rows anywhere, in any order; means of one to four pieces, some of them twice."""
    draw = random.Random(seed)
    places = draw.sample(range(new), new)
    carried = list(zip(places[: old - dropped], draw.sample(range(old), old - dropped),
                       strict=True))  # fmt: skip
    others = places[old - dropped : new - fresh]
    pieces = {at: draw.choices(range(old), k=1 + n % 4) for n, at in enumerate(others)}
    return carried, pieces, TokenMap.of((old, new), carried, pieces)


def planned(model, tokens, *, policy=None, operator="vocab", **target):
    grow = GrowConfig(operator=operator, tokenizer="new.json", state_policy=policy,
                      target={"vocab": tokens.rows[1], **target})  # fmt: skip
    large, growth = plan_growth(grow, model)
    return large, growth.with_tokens(tokens)


def of_vocabulary(catalog):
    return [tensor for tensor in catalog if "vocab" in tensor.axes]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["kept", "copy", "reset", "sparkling"])
def test_rows_go_by_their_text_and_new_ones_are_means(name, policy):
    model = MODELS[name]
    carried, pieces, tokens = token_map(fresh=0)
    _, growth = planned(model, tokens, policy=policy)
    small = build_catalog(model)
    old = random_state(small, seed=1)
    new = mapped(growth, small, old)
    assert len(of_vocabulary(small)) == 2 - model.tie_embeddings
    for tensor in growth.target:
        for slot in ADAM_SLOTS:
            before, after = (s.tensors[tensor.name, slot.name] for s in (old, new))
            moments = slot.name != "master"
            if "vocab" not in tensor.axes:
                expected = torch.zeros_like(before) if moments and policy == "reset" else before
                assert torch.equal(after, expected)
                continue
            for at, row in carried:
                nothing = moments and policy == "reset"
                assert torch.equal(after[at], torch.zeros_like(after[at]) if nothing
                                   else before[row])  # fmt: skip
            for at, parts in pieces.items():
                mean = before[parts].mean(0)
                kept = not moments or policy == "copy"
                assert torch.allclose(after[at], mean if kept else 0 * mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_old_tokens_stay_on_text_that_both_encode_alike(name):
    model = MODELS[name]
    carried, _, tokens = token_map(dropped=0, seed=3)
    large, growth = planned(model, tokens)
    small = build_catalog(model)
    old = random_state(small, seed=1)
    new = mapped(growth, small, old)
    places = torch.tensor([at for at, _ in sorted(carried, key=lambda pair: pair[1])])
    text = torch.randint(0, OLD, (3, model.sequence), generator=torch.manual_seed(0))
    with torch.no_grad():
        before = build(model, old).logits(text)
        after = build(large, new).logits(places[text])[..., places]
    assert (after - before).abs().max() <= 1e-10


LAYOUTS = [
    ((1, 1, 1, 0), (1, 2, 1, 0)),
    ((1, 1, 2, 0), (1, 2, 2, 0)),
    ((2, 1, 1, 3), (1, 3, 1, 0)),
    ((3, 1, 1, 1), (2, 1, 2, 1)),
]


@pytest.mark.parametrize("pair", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("staging", [1 << 20, 256])
def test_any_layout_gives_the_same_bits(pair, tied, staging):
    """Law 6: sums of up to four rows, whose parts are on different ranks."""
    before, after = (Layout(data=d, tensor=t, pipeline=p, zero=z) for d, t, p, z in pair)
    model = toy_model(tie_embeddings=tied)
    _, growth = planned(model, token_map(seed=4)[2], policy="copy")
    small = build_catalog(model)
    state = random_state(small, seed=5, dtype=torch.float32)
    expected = mapped(growth, small, state)
    rules = growth.rules_after(OptimizerRules(), step=3)
    a = Placement(small, before, group_keys(small, OptimizerRules()))
    b = Placement(growth.target, after, group_keys(growth.target, rules))

    def moved(channel):
        new = ShardState(b, channel.rank)
        transfer_between_ranks(
            state_map=growth, old=ShardState(a, channel.rank, whole_state=state), old_placement=a,
            new=new, new_placement=b, slots=ADAM_SLOTS, channel=channel, seed=0,
            staging_bytes=staging,
        )  # fmt: skip
        return new.fault(expected)

    world = max(before.world, after.world)
    assert on_threads(moved, world) == [None] * world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_read_through_it_is_the_same(dtype):
    model = toy_model()
    _, pieces, tokens = token_map(seed=4)
    _, growth = planned(model, tokens)
    small = build_catalog(model)
    state = random_state(small, seed=5, dtype=dtype)
    for key in state.tensors:
        state.tensors[key] = state.tensors[key].to(dtype)
    seen = Through(growth, state, Placement(small, Layout()), slots=ADAM_SLOTS,
                   dtype=lambda tensor, slot: dtype, seed=0, staging_bytes=1 << 12)  # fmt: skip
    [table] = of_vocabulary(growth.target)
    got = seen.read(table.name, "master", whole(table.shape))
    part = seen.read(table.name, "master", Box((5, 1), (9, 3)))
    assert got.dtype == dtype and torch.equal(part, got[5:14, 1:4])
    for at, parts in pieces.items():
        mean = state.tensors[table.name, "master"][parts].double().mean(0)
        # Rounded once: as near as the element type allows.
        assert (got[at].double() - mean).abs().max() <= torch.finfo(dtype).eps * mean.abs().max()


def test_new_rows_among_old_ones_count_their_own_steps():
    model = toy_model()
    carried, _, tokens = token_map(seed=6)
    _, growth = planned(model, tokens, policy="kept")
    [table] = of_vocabulary(growth.target)
    young = growth.rules_after(OptimizerRules(), step=9).young[table.name]
    assert YoungBlocks.from_json({**vars(young), "inside": None}) == young
    old = {at for at, _ in carried}
    for box in (whole(table.shape), Box((4, 3), (9, 2)), Box((20, 0), (1, 8))):
        at = box.offset[0]
        for part, blocks in bands(young, box):
            assert part.offset[0] == at and part.shape[1:] == box.shape[1:]
            rows = set(range(at, part.stop[0]))
            assert rows <= old if blocks is None else not rows & old
            if blocks is not None:
                assert [level for _, level in generations(blocks, part)] == [blocks]
            at = part.stop[0]
        assert at == box.stop[0]
    # From a checkpoint without optimizer state all rows count alike.
    assert not growth.rules_after(OptimizerRules(), step=0).young


def test_old_and_new_rows_of_two_growths():
    """A second growth keeps the first one's new rows inside its old ones."""
    model = toy_model()
    carried, _, tokens = token_map(seed=6)
    large, growth = planned(model, tokens, policy="kept")
    rules = growth.rules_after(OptimizerRules(), step=9)
    _, wider = plan_growth(GrowConfig(operator="width", factor=2, state_policy="kept"), large)
    twice = wider.rules_after(rules, step=12)
    [table] = of_vocabulary(wider.target)
    young, old = twice.young[table.name], {at for at, _ in carried}
    ages = torch.full(table.shape, -1.0)
    for part, blocks in bands(young, whole(table.shape)):
        assert blocks is not None
        for index, level in generations(blocks, part):
            ages[part.slices][index] = 0 if level is None else level.born
    assert (ages[:, 8:] == 12).all()
    for row in range(NEW):
        assert (ages[row, :8] == (0 if row in old else 9)).all()


def test_rows_that_are_scattered_too_far_need_another_policy():
    rows = 2 * MOST_RUNS + 4
    model = toy_model(vocab=MOST_RUNS + 2)
    carried = [(2 * row, row) for row in range(MOST_RUNS + 2)]
    tokens = TokenMap.of((MOST_RUNS + 2, rows), carried, {1: [0]})
    _, growth = planned(model, tokens, policy="kept")
    growth.rules_after(OptimizerRules(), step=0)
    with pytest.raises(GrowthError, match="scatters the old elements"):
        growth.rules_after(OptimizerRules(), step=9)


@pytest.mark.parametrize(
    ("operator", "target"),
    [("vocab+depth_identity", {"layers": 4}), ("width+vocab", {"hidden": 16, "heads": 4}),
     ("width_fresh+vocab", {"hidden": 10})],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_together_with_other_operators(operator, target, tied):
    model = toy_model(family="llama", tie_embeddings=tied)
    carried, pieces, tokens = token_map(dropped=0, fresh=0)
    if "fresh" in operator and not tied:  # whose new columns are drawn for each row
        with pytest.raises(GrowthError, match=r"output\.weight that width_fresh makes afresh"):
            planned(model, tokens, operator=operator, **target)
        return
    large, growth = planned(model, tokens, operator=operator, **target)
    small = build_catalog(model)
    old = random_state(small, seed=1)
    new = mapped(growth, small, old)
    places = torch.tensor([at for at, _ in sorted(carried, key=lambda pair: pair[1])])
    text = torch.randint(0, OLD, (3, model.sequence), generator=torch.manual_seed(0))
    with torch.no_grad():
        before = build(model, old).logits(text)
        after = build(large, new).logits(places[text])
    assert (after[..., places] - before).abs().max() <= 1e-10
    # The head is linear, so the logit of a new token is the mean of its pieces'.
    for at, parts in pieces.items():
        mean = before[..., parts].mean(-1)
        assert (after[..., at] - mean).abs().max() <= 1e-10


def test_a_growth_without_its_map_is_planned_and_never_applied():
    grow = GrowConfig(operator="vocab", tokenizer="new.json", target={"vocab": NEW})
    large, growth = plan_growth(grow, toy_model())
    assert large.vocab == NEW and growth.operator.lacking
    with pytest.raises(AssertionError, match="without its map of tokens"):
        mapped(growth, growth.small, random_state(growth.small, seed=0))
    other = TokenMap.of((OLD, NEW + 1), [(0, 0)], {})
    with pytest.raises(GrowthError, match="compared for another model"):
        growth.with_tokens(other)
    with pytest.raises(GrowthError, match="not known how many tokens"):
        plan_growth(GrowConfig(operator="vocab", tokenizer="new.json"), toy_model())
    with pytest.raises(GrowthError, match="no operator takes it"):
        plan_growth(
            GrowConfig(operator="width", tokenizer="new.json", target={"hidden": 16}), toy_model()
        )


@pytest.mark.parametrize("more", [{"factor": 2}, {"tokenizer": None, "allow_dropped": True}])
def test_settings_that_do_not_go_together(more):
    with pytest.raises(ValueError, match="tokenizer"):
        GrowConfig(**{"operator": "vocab", "tokenizer": "new.json", **more})
