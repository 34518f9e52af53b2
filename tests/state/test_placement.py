"""Placement, compared with a naive model of DeepSpeed's and Megatron's partitioning.

The naive model lays out element numbers, one by one, and partitions them as the engines do.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.growth.optimizer_rules import Factors, OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, tiling_fault, whole
from megagrow.state.catalog import Catalog, Init, LogicalTensor
from megagrow.state.layout import SPLIT_AXES, Layout
from megagrow.state.placement import Placement, split_axis
from tests.toys import toy_model, toy_models

MODELS = dict(toy_models())
# Groups of four kinds, as after a growth with the exact policy.
RULES = OptimizerRules({"layers.0.mlp.up.weight": Factors(0.5, 2.0, 0.5)})

layouts = st.builds(
    Layout,
    data=st.integers(1, 4),
    tensor=st.integers(1, 3),
    pipeline=st.integers(1, 3),
    zero=st.integers(0, 3),
)


@st.composite
def catalogs(draw):
    """A few tensors of any shape, some tied, with or without a split axis."""
    tensors = []
    for number in range(draw(st.integers(3, 5))):
        axes = draw(
            st.lists(
                st.sampled_from(["embed", "ffn", "head_dim", "vocab"]),
                min_size=1, max_size=3, unique=True,
            )
        )  # fmt: skip
        if {"ffn", "vocab"} <= set(axes):
            axes.remove("ffn")
        shape = [draw(st.integers(1, 7)) for _ in axes]
        places = (number,) if draw(st.integers(0, 2)) else (0, number)
        tensors.append(
            LogicalTensor(
                f"t{number}", tuple(shape), tuple(axes), Init("zeros"), bool(number % 2),
                tuple(sorted(set(places))),
            )
        )  # fmt: skip
    return Catalog(tuple(tensors))


def placement_of(catalog, layout):
    return Placement(catalog, layout, group_keys(catalog, RULES))


def naive_holdings(placement, rank):
    """{tensor: element numbers of the logical tensor} that a rank holds."""
    catalog, layout = placement.catalog, placement.layout
    at = layout.coordinates(rank)
    keys = group_keys(catalog, RULES)
    local = {}  # group -> [(name, element numbers of the local parameter; -1 is padding)]
    for tensor in catalog:
        stages = {
            stage
            for stage in range(layout.pipeline)
            for place in tensor.places
            if placement.cuts[stage] <= place < placement.cuts[stage + 1]
        }
        if at.pipe not in stages:
            continue
        numbers = np.arange(tensor.volume).reshape(tensor.shape)
        for axis, meaning in enumerate(tensor.axes):
            if meaning in SPLIT_AXES and layout.tensor > 1:
                size = -(-tensor.shape[axis] // layout.tensor)
                lack = [(0, 0)] * len(tensor.shape)
                lack[axis] = (0, size * layout.tensor - tensor.shape[axis])
                padded = np.pad(numbers, lack, constant_values=-1)
                numbers = np.split(padded, layout.tensor, axis)[at.tensor]
        local.setdefault(keys[tensor.name], []).append((tensor.name, numbers.ravel()))
    held = {}
    for _, members in sorted(local.items()):
        buffers = [members]
        if layout.zero == 3:
            buffers = [[member] for member in members]
        for buffer in buffers:
            owner = np.concatenate([np.full(len(n), i) for i, (_, n) in enumerate(buffer)])
            numbers = np.concatenate([n for _, n in buffer])
            if layout.zero and layout.data > 1:
                unit = layout.data if layout.zero == 3 else 2 * layout.data
                lack = -len(numbers) % unit
                owner = np.pad(owner, (0, lack), constant_values=-1)
                numbers = np.pad(numbers, (0, lack), constant_values=-1)
                owner = np.split(owner, layout.data)[at.data]
                numbers = np.split(numbers, layout.data)[at.data]
            for i, (name, _) in enumerate(buffer):
                mine = numbers[(owner == i) & (numbers >= 0)]
                if len(mine):
                    held[name] = mine.tolist()
    return held


def elements(placement, name, box):
    """The element numbers of a box."""
    shape = placement.catalog[name].shape
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return numbers[box.slices].ravel().tolist()


def check(catalog, layout):
    """All methods of a placement, compared with the naive model."""
    placement = placement_of(catalog, layout)
    held = [naive_holdings(placement, rank) for rank in range(layout.world)]
    written = {tensor.name: [] for tensor in catalog}
    for rank in range(layout.world):
        found = {}
        for shard in placement.shards(rank):
            # In the order of memory, so a list comparison proves contiguity as well.
            found.setdefault(shard.tensor, []).extend(elements(placement, shard.tensor, shard.box))
        assert found == held[rank]
        for name in written:
            alone = [s for s in placement.shards(rank) if s.tensor == name]
            assert list(placement.shards_of(name, rank)) == alone
        for shard in placement.written_by(rank):
            assert set(elements(placement, shard.tensor, shard.box)) <= set(
                held[rank][shard.tensor]
            )
            written[shard.tensor].append(shard.box)
    for tensor in catalog:
        assert tiling_fault(tensor.shape, written[tensor.name]) is None
    return placement, held


def check_box(placement, held, name, box):
    """Holders are all ranks that hold a part; sources are one rank per element."""
    wanted = set(elements(placement, name, box))
    by_rank = {}
    for rank, part in placement.holders(name, box):
        assert box.contains(part)
        by_rank.setdefault(rank, []).extend(elements(placement, name, part))
    for rank in range(placement.layout.world):
        expected = wanted & set(held[rank].get(name, ()))
        assert sorted(by_rank.get(rank, [])) == sorted(expected)
    for reader in range(placement.layout.world + 2):
        given_ = []
        own = set(held[reader].get(name, ())) if reader < len(held) else set()
        for rank, part in placement.sources(name, box, reader=reader):
            numbers = elements(placement, name, part)
            assert set(numbers) <= set(held[rank][name])
            given_ += numbers
            # The reader takes everything that it holds from itself.
            assert rank == reader or not own & set(numbers)
        assert sorted(given_) == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(catalog=catalogs(), layout=layouts, data=st.data())
def test_any_placement_is_the_naive_one(catalog, layout, data):
    if layout.pipeline > max(p for t in catalog for p in t.places) + 1:
        return
    placement, held = check(catalog, layout)
    tensor = data.draw(st.sampled_from(catalog.tensors))
    offset = [data.draw(st.integers(0, n - 1)) for n in tensor.shape]
    shape = [data.draw(st.integers(1, n - o)) for n, o in zip(tensor.shape, offset, strict=True)]
    check_box(placement, held, tensor.name, Box(tuple(offset), tuple(shape)))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(data=3, zero=1),
        Layout(data=4, zero=2),
        Layout(data=3, zero=3),
        Layout(tensor=2),
        Layout(data=2, tensor=2, zero=1),
        Layout(pipeline=3),
        Layout(data=2, tensor=2, pipeline=2, zero=1),
        Layout(data=3, tensor=2, pipeline=2, zero=3),
    ],
    ids=str,
)
def test_models_are_placed_as_the_naive_model_says(model, layout):
    catalog = build_catalog(model)
    placement, held = check(catalog, layout)
    for tensor in catalog:
        check_box(placement, held, tensor.name, whole(tensor.shape))


def test_padding_belongs_to_nobody():
    catalog = build_catalog(toy_model(vocab=13))
    placement = placement_of(catalog, Layout(tensor=4))
    local = [placement.local(catalog["embedding.token"], t) for t in range(4)]
    assert [item.box.shape[0] for item in local] == [4, 4, 4, 1]
    assert {item.shape for item in local} == {(4, 8)}
    assert local[0].numel == 32
    last = list(placement.shards_of("embedding.token", 3))
    assert [shard.box for shard in last] == [Box((12, 0), (1, 8))]


def test_a_rank_of_padding_alone_holds_nothing():
    tensor = LogicalTensor("t", (5, 2), ("vocab", "embed"), Init("zeros"), True, (0,))
    placement = Placement(Catalog((tensor,)), Layout(tensor=4))
    assert list(placement.shards(3)) == []
    assert {rank for rank, _ in placement.holders("t", whole((5, 2)))} == {0, 1, 2}


def test_a_tied_tensor_lives_on_both_stages_and_is_written_once():
    catalog = build_catalog(toy_model(tie_embeddings=True))
    placement = placement_of(catalog, Layout(pipeline=2))
    token = catalog["embedding.token"]
    assert placement.stages(token) == (0, 1)
    assert placement.stages(catalog["embedding.position"]) == (0,)
    writers = [r for r in range(2) for s in placement.written_by(r) if s.tensor == token.name]
    assert writers == [0]


def test_replicas_share_the_writing():
    catalog = build_catalog(toy_model())
    placement = placement_of(catalog, Layout(data=4))
    counts = [len(list(placement.written_by(rank))) for rank in range(4)]
    assert sum(counts) == len(catalog) and max(counts) - min(counts) <= 1


def test_groups_come_in_the_order_of_their_keys():
    catalog = build_catalog(toy_model())
    groups = placement_of(catalog, Layout()).groups(0)
    assert [key for key, _ in groups] == [
        (False, 0.5, 2.0, 0.5, False),
        (False, 1.0, 1.0, 1.0, False),
        (True, 1.0, 1.0, 1.0, False),
    ]
    order = [t.name for t in catalog]
    for key, tensors in groups:
        names = [t.name for t in tensors]
        assert names == sorted(names, key=order.index)
        assert all(t.decay != key[0] for t in tensors)
    assert sorted(t.name for _, tensors in groups for t in tensors) == sorted(order)


def test_which_axis_is_split():
    catalog = build_catalog(toy_model())
    axes = {
        "embedding.token": 0,
        "embedding.position": None,
        "layers.0.attention.qkv.weight": 0,
        "layers.0.attention.out.weight": 1,
        "layers.0.attention.out.bias": None,
        "layers.0.mlp.down.weight": 1,
        "final_norm.weight": None,
    }
    assert {name: split_axis(catalog[name]) for name in axes} == axes
    assert not Placement(catalog, Layout(data=2)).is_split(catalog["embedding.token"])
