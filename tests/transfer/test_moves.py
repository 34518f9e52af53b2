"""Plans: both sides of every message agree without communication."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import make_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, MASTER
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.moves import Move, messages, plan_receives, plan_sends
from megagrow.transfer.state_map import AxisMap, Copy, Identity
from tests.toys import growths, larger, toy_model

layouts = st.builds(
    Layout,
    data=st.integers(1, 3),
    tensor=st.integers(1, 2),
    pipeline=st.integers(1, 3),
    zero=st.integers(0, 3),
)


def _placement(catalog, layout):
    return Placement(catalog, layout, group_keys(catalog, OptimizerRules()))


@settings(max_examples=40, deadline=None)
@given(
    old=layouts,
    new=layouts,
    growth=st.sampled_from([None, *growths()]),
    tied=st.booleans(),
)
def test_what_is_sent_is_what_is_received(old, new, growth, tied):
    model = toy_model(layers=1, hidden=4, ffn=6, sequence=3, vocab=5, tie_embeddings=tied)
    small = build_catalog(model)
    if growth is None:
        state_map = Identity(small)
    else:
        operator, policy, factor = growth
        grown = larger(model, operator, factor)
        state_map = make_growth(
            operator=operator, policy=policy, small=small, target=build_catalog(grown)
        )
    a, b = _placement(small, old), _placement(state_map.target, new)
    received, sent = [], []
    for rank in range(max(old.world, new.world)):
        mine = list(plan_receives(state_map, a, b, slots=ADAM_SLOTS, rank=rank))
        assert all(move.receiver == rank for move in mine)
        given_ = list(plan_sends(state_map, a, b, slots=ADAM_SLOTS, rank=rank))
        assert all(move.holder == rank for move in given_)
        received += mine
        sent += given_
    keys = [(m.holder, m.receiver, m.key) for m in received]
    assert len(keys) == len(set(keys))
    assert sorted(keys) == sorted((m.holder, m.receiver, m.key) for m in sent)
    # Together they are all elements of the target ranks that blocks cover.
    needed = 0
    for rank in range(new.world):
        for shard in b.shards(rank):
            for slot in ADAM_SLOTS:
                for copy in state_map.copies(state_map.target[shard.tensor], slot):
                    part = copy.from_target(shard.box)
                    needed += part.volume if part else 0
    assert sum(move.part.volume for move in received) == needed


def _move(number, shape):
    copy = Copy("w", tuple(AxisMap(0, 2, 0, 1, n) for n in shape), 1.0)
    return Move((number, 0, 0), "w", MASTER, copy, Box((0,) * len(shape), tuple(shape)), 0, 1)


@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=0, max_size=6),
    limit=st.integers(1, 40),
    data=st.data(),
)
def test_messages_hold_every_element_once_and_no_more_than_fits(shapes, limit, data):
    moves = [_move(number, shape) for number, shape in enumerate(shapes)]
    packed = messages(moves, limit)
    assert packed == messages(data.draw(st.permutations(moves)), limit)
    assert all(0 < sum(move.part.volume for move in batch) <= limit for batch in packed)
    pieces = {}
    for batch in packed:
        for move in batch:
            boxes = pieces.setdefault(move.index[0], [])
            assert all(move.part.intersect(other) is None for other in boxes)
            boxes.append(move.part)
    for number, move in enumerate(moves):
        assert sum(box.volume for box in pieces[number]) == move.part.volume


def test_a_move_knows_both_of_its_boxes():
    copy = Copy("w", (AxisMap(1, 2, 3, 1, 4),), 0.5)  # source 3..6 -> target 1, 3, 5, 7
    move = Move((0, 0, 0), "w", MASTER, copy, Box((1,), (2,)), 0, 1)
    assert move.target_box == Box((3,), (3,)) and move.source_box == Box((4,), (2,))
    assert move.target_index() == (slice(0, 3, 2),) and move.source_index() == (slice(0, 2, 1),)
