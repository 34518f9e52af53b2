"""Laws 1, 6 and 7: a transfer between any two layouts equals one process and slicing."""

import itertools
import tracemalloc
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, Catalog, Init, LogicalTensor
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.ends import NoChannel
from megagrow.transfer.execute import (
    TransferReport,
    transfer_between_ranks,
    transfer_from_storage,
)
from megagrow.transfer.moves import plan_receives
from megagrow.transfer.state_map import FreshStart, Identity
from megagrow.transfer.whole_state import MemoryState
from tests.ranks import run_ranks
from tests.toys import (
    FAMILIES,
    ShardState,
    grow,
    growths,
    mapped,
    on_threads,
    random_state,
    toy_model,
)

GROWTHS = [None, *growths()]
# (data, tensor, pipeline, zero) before and after; worlds may differ.
PAIRS = [
    ((1, 1, 1, 0), (4, 1, 1, 1)),
    ((4, 1, 1, 2), (1, 1, 1, 0)),
    ((3, 1, 1, 3), (2, 1, 1, 1)),
    ((4, 1, 1, 1), (1, 4, 1, 0)),
    ((1, 4, 1, 0), (1, 1, 4, 0)),
    ((1, 1, 4, 0), (4, 1, 1, 3)),
    ((2, 2, 1, 1), (2, 1, 2, 1)),
    ((2, 1, 2, 0), (1, 2, 2, 0)),
    ((1, 2, 2, 1), (2, 2, 1, 3)),
    ((2, 2, 2, 1), (4, 2, 1, 2)),
    ((4, 2, 1, 3), (2, 2, 2, 0)),
    ((2, 2, 2, 0), (8, 1, 1, 3)),
    ((3, 2, 1, 1), (1, 2, 3, 0)),
    ((1, 3, 2, 1), (2, 1, 3, 1)),
]


def _layout(sizes):
    data, tensor, pipeline, zero = sizes
    return Layout(data=data, tensor=tensor, pipeline=pipeline, zero=zero)


def _place(catalog, layout, rules=None):
    return Placement(catalog, layout, group_keys(catalog, rules or OptimizerRules()))


def _grown(model, growth):
    """(old catalog, old state, state map, new state, rules): all whole, in one process."""
    small = build_catalog(model)
    state = random_state(small, seed=5, dtype=torch.float32)
    if growth is None:
        return small, state, Identity(small), state, OptimizerRules()
    operator, policy, factor = growth
    _, state_map, new = grow(model, state, operator=operator, policy=policy, factor=factor)
    return small, state, state_map, new, state_map.rules_after(OptimizerRules(), step=3)


def _transfer(channel, job, before, after, *, staging_bytes=1 << 20, watch=nullcontext):
    """One rank's part of the job of `_grown`: (fault, report, own bytes, all bytes)."""
    small, state, state_map, expected, rules = job
    a, b = _place(small, before), _place(state_map.target, after, rules)
    old = ShardState(a, channel.rank, whole_state=state)
    new = ShardState(b, channel.rank)
    with watch():
        report = transfer_between_ranks(
            state_map=state_map, old=old, old_placement=a, new=new, new_placement=b,
            slots=ADAM_SLOTS, channel=channel, seed=0, staging_bytes=staging_bytes,
        )  # fmt: skip
    moves = plan_receives(state_map, a, b, slots=ADAM_SLOTS, rank=channel.rank)
    own = sum(4 * move.part.volume for move in moves if move.holder == channel.rank)
    held = sum(4 * memory.numel() for boxes in new.boxes.values() for _, memory in boxes)
    return new.fault(expected), report, own, held


def _on_threads(job, before, after, **options):
    world = max(before.world, after.world)
    return on_threads(lambda channel: _transfer(channel, job, before, after, **options), world)


class _NoLargeTensor(TorchDispatchMode):
    """Fails if a tensor of more than `limit` bytes is allocated in this thread."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def memories(tree):
            leaves = (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
            return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves}

        known = memories((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = [n for at, n in memories(result).items() if at not in known]
        assert max(made, default=0) <= self.limit, f"{func} makes {max(made)} bytes"
        return result


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "->".join("".join(map(str, s)) for s in p))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_growing_in_one_layout_and_landing_in_another_is_slicing(pair, tied):
    before, after = map(_layout, pair)
    model = toy_model(tie_embeddings=tied)
    # Growths take turns over the pairs; test_any_two_layouts draws the rest.
    number = 2 * PAIRS.index(pair) + tied
    for growth in (GROWTHS[number % len(GROWTHS)], ("width", "exact", 2 + number % 2)):
        for fault, *_ in _on_threads(_grown(model, growth), before, after):
            assert fault is None, growth


# A model that every pair above can split evenly: 12 groups of 2 queries each in the LLaMA family.
_HEADS = {"hidden": 48, "heads": 24, "ffn": 12, "layers": 2, "vocab": 11, "sequence": 3}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "->".join("".join(map(str, s)) for s in p))
@pytest.mark.parametrize("kind", ["width", "depth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_grows_in_width_and_depth_in_both_families(family, kind, pair):
    """Law 6, bit for bit; operators of every kind and their policies take turns over the pairs."""
    grouped = {"kv_heads": 12} if family == "llama" else {}
    model = toy_model(**_HEADS, family=family, **grouped)
    some = [g for g in growths() if g[0].split("_")[0] == kind]
    growth = some[(5 * PAIRS.index(pair) + FAMILIES.index(family)) % len(some)]
    before, after = map(_layout, pair)
    for fault, *_ in _on_threads(_grown(model, growth), before, after):
        assert fault is None, growth


def test_the_pairs_are_enough():
    assert len(set(PAIRS)) >= 12 and all(before != after for before, after in PAIRS)


layouts = st.builds(
    Layout,
    data=st.integers(1, 3),
    tensor=st.integers(1, 3),
    pipeline=st.integers(1, 2),
    zero=st.integers(0, 3),
)


@settings(max_examples=15, deadline=None)
@given(
    before=layouts,
    after=layouts,
    growth=st.sampled_from(GROWTHS),
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    vocab=st.integers(5, 9),
)
def test_any_two_layouts(before, after, growth, family, tied, vocab):
    model = toy_model(
        layers=1, hidden=4, ffn=6, sequence=3, vocab=vocab, tie_embeddings=tied, family=family
    )
    for fault, *_ in _on_threads(_grown(model, growth), before, after):
        assert fault is None


@pytest.mark.parametrize("staging_bytes", [256, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("growth", [None, ("width", "exact", 3), ("depth_stack", "copy", 2)])
def test_no_rank_gathers(growth, staging_bytes):
    """Law 7: staging stays within its setting, and every byte is received once."""
    before, after = Layout(data=4, zero=1), Layout(data=2, tensor=2, zero=2)
    model = toy_model()
    # Two buffers, each of half the setting, and nothing else of any size.
    results = _on_threads(
        _grown(model, growth), before, after,
        staging_bytes=staging_bytes, watch=lambda: _NoLargeTensor(staging_bytes // 2),
    )  # fmt: skip
    for fault, report, own, held in results:
        assert fault is None
        assert 0 < report.peak_staging_bytes <= staging_bytes
        assert report.bytes_written == held
        assert report.bytes_received + own == held
        assert report.bytes_received > 0
    if staging_bytes == 256:
        assert max(4 * tensor.volume for tensor in build_catalog(model)) > staging_bytes


def test_messages_cross_one_element_at_a_time():
    model = toy_model(layers=1, hidden=4, ffn=4, sequence=2, vocab=5)
    results = _on_threads(
        _grown(model, None), Layout(data=2, zero=1), Layout(tensor=2), staging_bytes=1
    )
    assert [fault for fault, *_ in results] == [None, None]
    assert {report.peak_staging_bytes for _, report, *_ in results} == {8}


def test_fresh_values_are_made_in_bounded_pieces():
    tensor = LogicalTensor("w", (700, 600), ("ffn", "embed"), Init("normal", 1.0), True, (0,))
    catalog = Catalog((tensor,))
    state = MemoryState.empty(catalog, ADAM_SLOTS)
    place = Placement(catalog, Layout())
    staging_bytes = 256 * 1024
    tracemalloc.start()
    report = transfer_between_ranks(
        state_map=FreshStart(catalog), old=state, old_placement=place, new=state,
        new_placement=place, slots=ADAM_SLOTS, channel=NoChannel(), seed=3,
        staging_bytes=staging_bytes,
    )  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * staging_bytes < 8 * tensor.volume
    assert 0 < report.peak_staging_bytes <= staging_bytes
    assert not any(values.isnan().any() for values in state.tensors.values())
    assert state.tensors["w", "master"].std() > 0.9
    assert not state.tensors["w", "exp_avg"].any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_start_is_the_same_in_every_layout(tied):
    model = toy_model(tie_embeddings=tied)
    catalog = build_catalog(model)
    expected = mapped(FreshStart(catalog), catalog, MemoryState.empty(catalog, ADAM_SLOTS), seed=9)
    for sizes in ((3, 1, 1, 1), (2, 2, 1, 3), (1, 3, 2, 0)):
        place = _place(catalog, _layout(sizes))

        def start(channel, place=place):
            new = ShardState(place, channel.rank)
            transfer_between_ranks(
                state_map=FreshStart(catalog), old=new, old_placement=place, new=new,
                new_placement=place, slots=ADAM_SLOTS, channel=channel, seed=9,
                staging_bytes=1000,
            )  # fmt: skip
            return new.fault(expected)

        assert on_threads(start, place.layout.world) == [None] * place.layout.world


class _Files:
    """Storage that any rank can read: shards of an old job, as a locator and a reader."""

    def __init__(self, placement, state):
        self.placement = placement
        self.parts = {
            rank: ShardState(placement, rank, whole_state=state)
            for rank in range(placement.layout.world)
        }
        self.reads = Counter()

    def sources(self, name, box, *, reader):
        # A checkpoint has no replicas: `written_by` decides, for every reader.
        for rank in self.parts:
            for shard in self.placement.written_by(rank):
                common = shard.box.intersect(box) if shard.tensor == name else None
                if common is not None:
                    yield rank, common

    def dtype(self, tensor, slot):
        return torch.float32

    def read(self, tensor, slot, box, *, out=None):
        self.reads[tensor, slot] += box.volume
        for rank, part in self.parts.items():
            for shard in self.placement.written_by(rank):
                if shard.tensor == tensor and shard.box.contains(box):
                    return part.read(tensor, slot, box, out=out)
        raise KeyError(tensor)


@pytest.mark.parametrize("growth", [None, ("width", "sparkling", 2), ("depth_stack", "copy", 3)])
@pytest.mark.parametrize("staging_bytes", [256, 1 << 20])
def test_from_storage(growth, staging_bytes):
    model = toy_model()
    small, state, state_map, expected, rules = _grown(model, growth)
    files = _Files(_place(small, Layout(data=3, tensor=2, zero=1)), state)
    after = _place(state_map.target, Layout(data=2, pipeline=2, zero=1), rules)
    for rank in range(after.layout.world):
        new = ShardState(after, rank)
        report = transfer_from_storage(
            state_map=state_map, old=files, locator=files, new=new, new_placement=after,
            slots=ADAM_SLOTS, rank=rank, seed=0, staging_bytes=staging_bytes,
        )  # fmt: skip
        assert new.fault(expected) is None
        assert report.peak_staging_bytes <= staging_bytes
        held = sum(m.numel() for boxes in new.boxes.values() for _, m in boxes)
        covered = held
        if growth is not None and growth[1] == "sparkling":
            covered = sum(
                part.volume
                for shard in after.shards(rank)
                for slot in ADAM_SLOTS
                for copy in state_map.copies(state_map.target[shard.tensor], slot)
                if (part := copy.from_target(shard.box))
            )
            assert covered < held
        assert report.bytes_written == 4 * covered
    if growth is None:
        # Replicas aside, nothing is read twice.
        assert all(files.reads[t.name, "master"] >= t.volume for t in small)


def test_a_single_rank_has_no_peer():
    with pytest.raises(AssertionError, match="no peer"):
        NoChannel().exchange(send=None, to=0, receive=None, source=0)
    assert TransferReport().bytes_written == 0


# --- the same over real processes ---------------------------------------------------------


def _real_pairs(comm, pairs):
    """This rank's faults over pairs of layouts, growths and families."""
    faults = []
    for before, after, growth in pairs:
        job = _grown(toy_model(), growth)
        fault, report, *_ = _transfer(comm, job, before, after, staging_bytes=8192)
        faults.append(fault or (report.peak_staging_bytes > 8192 and "too much staging"))
    return faults


def _data_layouts():
    return [Layout(data=d, zero=z) for d in (1, 2, 3, 4) for z in (0, 1, 2)]


def test_real_processes():
    """Every layout before and after once, over gloo; the slow test below covers all pairs."""
    found = _data_layouts()
    some = [("width", "exact", 2), ("width", "sparkling", 3), ("depth_stack", "copy", 2), None]
    pairs = [
        (before, found[(5 * i + 3) % len(found)], some[i % len(some)])
        for i, before in enumerate(found)
    ]
    for rank, faults in enumerate(run_ranks(4, _real_pairs, pairs)):
        assert not any(faults), (rank, faults)


@pytest.mark.slow
def test_real_processes_all_pairs():
    by_turns = itertools.cycle(growths())
    layouts = _data_layouts()
    pairs = [
        (before, after, next(by_turns)) for before in layouts for after in layouts for _ in range(2)
    ]
    for rank, faults in enumerate(run_ranks(4, _real_pairs, pairs, timeout=500)):
        assert not any(faults), (rank, faults)
