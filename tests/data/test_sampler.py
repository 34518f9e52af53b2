"""The order law: sample k is a function of data, seed and k alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.permutation import positions
from megagrow.data.position import Int64, Position, Taken
from megagrow.data.sampler import (
    SampleIndex,
    mix,
    permuted,
    rank_slice,
    validation_samples,
    validation_windows,
)
from megagrow.errors import DataError

TOKENS = 1003


def make(prefix: Path, tokens: int = TOKENS) -> IndexedDataset:
    """A dataset whose token i is i, in documents of 10."""
    with IndexedWriter(prefix, "int32") as writer:
        for start in range(0, tokens, 10):
            writer.add_document(range(start, min(tokens, start + 10)))
    return IndexedDataset(prefix)


@pytest.fixture
def data(tmp_path: Path) -> IndexedDataset:
    return make(tmp_path / "train")


def test_scatter_is_splitmix64() -> None:
    # The published generator's first outputs from state 0: state advances by the
    # golden ratio, which `mix` adds itself.
    golden = 0x9E3779B97F4A7C15
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(golden) == 0x6E789E6AA1B965F4


@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_permutation_reaches_each_place_once(size: int, key: int) -> None:
    places = [permuted(position, size=size, key=key) for position in range(size)]
    assert sorted(places) == list(range(size))


def test_order_is_pinned(data: IndexedDataset) -> None:
    # Runs that are resumed with a later version must continue in the same order.
    firsts = [int(SampleIndex(data, 100, seed=7).sample(k)[0]) for k in range(12)]
    assert firsts == PINNED


PINNED = [617, 317, 117, 17, 417, 517, 717, 820, 217, 920, 950, 350]


@pytest.mark.parametrize("sequence", [1, 7, 64, 500, 1002])
def test_an_epoch_labels_each_token_at_most_once(data: IndexedDataset, sequence: int) -> None:
    index = SampleIndex(data, sequence, seed=3)
    for epoch in range(3):
        batch = index.batch(epoch * index.windows, index.windows)
        assert batch.shape == (TOKENS // sequence, sequence + 1) and batch.dtype == np.int64
        assert (np.diff(batch, axis=1) % TOKENS == 1).all()
        labels = batch[:, 1:].ravel()
        assert len(set(labels.tolist())) == len(labels) == TOKENS // sequence * sequence


def test_each_epoch_has_its_own_order_and_borders(data: IndexedDataset) -> None:
    index = SampleIndex(data, 16, seed=3)
    epochs = [index.batch(number * index.windows, index.windows)[:, 0] for number in range(4)]
    for number, epoch in enumerate(epochs):
        assert (np.diff(epoch) != 16).any()
        for other in epochs[:number]:
            assert set(epoch.tolist()) != set(other.tolist())
            shift = (epoch - other) % TOKENS
            assert len(set(shift.tolist())) > 1


def test_seeds_differ(data: IndexedDataset) -> None:
    batches = [SampleIndex(data, 16, seed).batch(0, 20).tobytes() for seed in range(5)]
    assert len(set(batches)) == 5


def test_random_access_equals_iteration(data: IndexedDataset, tmp_path: Path) -> None:
    index = SampleIndex(data, 48, seed=11)
    whole = index.batch(0, 100)
    fresh = SampleIndex(IndexedDataset(data.prefix), 48, seed=11)
    for k in reversed(range(100)):
        np.testing.assert_array_equal(fresh.sample(k), whole[k])
    np.testing.assert_array_equal(fresh.batch(37, 9), whole[37:46])


@pytest.mark.parametrize(
    ("micro", "accumulation", "data_size"),
    [(24, 1, 1), (1, 24, 1), (6, 4, 1), (6, 1, 4), (3, 2, 4), (1, 3, 8), (4, 3, 2)],
)
def test_global_batch_does_not_depend_on_the_layout(
    micro: int, accumulation: int, data_size: int
) -> None:
    firsts = [
        rank_slice(
            1000, micro=micro, accumulation=accumulation, data_rank=rank, data_size=data_size
        )
        for rank in range(data_size)
    ]
    in_order = [
        firsts[rank][step] + row
        for step in range(accumulation)
        for rank in range(data_size)
        for row in range(micro)
    ]
    assert in_order == list(range(1000, 1024))


def test_rank_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_slice(0, micro=1, accumulation=1, data_rank=2, data_size=2)


def test_validation_samples_are_fixed_and_do_not_overlap(data: IndexedDataset) -> None:
    samples = validation_samples(data, sequence=100, count=4)
    expected = [list(range(start, start + 101)) for start in PINNED_VALIDATION]
    assert samples.tolist() == expected and samples.dtype == np.int64
    assert len(validation_samples(data, sequence=100, count=99)) == 10
    assert len(validation_samples(data, sequence=TOKENS - 1, count=1)) == 1


PINNED_VALIDATION = (100, 200, 600, 800)


@pytest.mark.parametrize("count", [1, 2, 7, 33, 62, 63, 1000])
def test_validation_covers_the_whole_split(data: IndexedDataset, count: int) -> None:
    """One window from each of `count` equal parts of the split, without duplicates."""
    sequence = 16
    windows = (TOKENS - 1) // sequence
    chosen = validation_windows(data, sequence=sequence, count=count)
    if count >= windows:
        assert chosen == list(range(windows))
    else:
        starts = [number * windows // count for number in range(count + 1)]
        assert all(a <= w < b for w, a, b in zip(chosen, starts, starts[1:], strict=False))
        assert len(chosen) == count
    assert chosen == validation_windows(data, sequence=sequence, count=count)


def test_an_id_outside_the_vocabulary_names_file_sample_and_token(tmp_path: Path) -> None:
    data = IndexedDataset(make(tmp_path / "train").prefix, vocabulary=TOKENS - 3)
    index = SampleIndex(data, 100, seed=7)
    bad = next(k for k in range(12) if _covers(index, k))
    with pytest.raises(DataError, match=rf"(?s)train\.bin: .*in sample {bad}\n.*found: +1000 at "
                       r"token 1000.*0 to 999.*--overwrite"):  # fmt: skip
        index.sample(bad)
    with pytest.raises(DataError, match="in validation window 9"):
        validation_samples(data, sequence=100, count=10)
    assert validation_samples(data, sequence=100, count=4).max() < TOKENS - 3


def _covers(index: SampleIndex, k: int) -> bool:
    """Whether sample k contains the first id outside the vocabulary."""
    whole = SampleIndex(IndexedDataset(index.dataset.prefix), index.sequence, index.seed)
    return TOKENS - 3 in whole.sample(k)


def test_too_few_tokens(tmp_path: Path) -> None:
    data = make(tmp_path / "small", 64)
    with pytest.raises(DataError, match=r"(?s)small.*64 tokens.*at least 65.*model\.sequence"):
        validation_samples(data, sequence=64, count=1)
    with pytest.raises(DataError, match="small"):
        SampleIndex(data, 64, seed=0)
    assert SampleIndex(data, 63, seed=0).sample(5).shape == (64,)


def test_negative_sample(data: IndexedDataset) -> None:
    with pytest.raises(IndexError):
        SampleIndex(data, 8, seed=0).sample(-1)


@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_positions_invert_the_permutation(size: int, key: int) -> None:
    places = np.array([permuted(position, size=size, key=key) for position in range(size)])
    assert positions(places, size=size, key=key).tolist() == list(range(size))


def _walk(data: IndexedDataset, lengths: list[tuple[int, int]], seed: int) -> list[Int64]:
    """The samples of a run that consumes the given number of each length, one per step."""
    position, found = Position(), []
    for sequence, count in lengths:
        for _ in range(count):
            before, done = position.split(sequence)
            found.append(SampleIndex(data, sequence, seed, before.pairs).sample(done))
            position = position.after(1, sequence=sequence)
    return found


_LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=4)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=_LENGTHS, seed=st.integers(0, 5))
def test_an_epoch_labels_each_token_once_whatever_the_lengths(
    data: IndexedDataset, lengths: list[tuple[int, int]], seed: int
) -> None:
    """Includes non-multiples and changes back; the last length continues into the next epoch."""
    *changes, (last, _) = lengths
    before = Position()
    for sequence, count in changes:
        before = before.after(count, sequence=sequence)
    index = SampleIndex(data, last, seed, before.split(last)[0].pairs)
    epoch, done = index.begun.epoch, before.split(last)[1]
    walked = _walk(data, changes, seed)
    rest = index.begun.tokens // last
    walked += [index.sample(k) for k in range(done, rest)]
    labels = np.concatenate([sample[1:] for sample in walked])
    counts = np.bincount(labels, minlength=TOKENS)
    # Earlier whole epochs leave out fewer tokens than one sample, different ones each.
    beyond = -(-max(0, done - rest) // index.windows)
    assert counts.max() <= epoch + 1 + beyond
    if epoch == 0 and done <= rest:
        assert counts.sum() > TOKENS - last
    after = rest + beyond * index.windows  # where an epoch begins
    following = [index.sample(after + k)[1:] for k in range(index.windows)]
    assert np.bincount(np.concatenate(following), minlength=TOKENS).max() == 1


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=_LENGTHS, more=_LENGTHS, seed=st.integers(0, 5))
def test_samples_do_not_depend_on_the_lengths_that_come_after(
    data: IndexedDataset,
    lengths: list[tuple[int, int]],
    more: list[tuple[int, int]],
    seed: int,
) -> None:
    first, longer = _walk(data, lengths, seed), _walk(data, [*lengths, *more], seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, longer, strict=False))
    # With a single length the order is unchanged.
    sequence, count = lengths[0]
    alone = SampleIndex(data, sequence, seed).batch(0, count)
    assert all(np.array_equal(a, b) for a, b in zip(first, alone, strict=False))


def test_a_quarter_of_an_epoch_of_short_samples_hides_no_token_from_the_long_ones(
    data: IndexedDataset,
) -> None:
    short = SampleIndex(data, 8, seed=1)
    quarter = short.windows // 4
    long = SampleIndex(data, 32, seed=1, before=((8, quarter),))
    seen = [short.sample(k)[1:] for k in range(quarter)]
    seen += [long.sample(k)[1:] for k in range((TOKENS - 8 * quarter) // 32)]
    counts = np.bincount(np.concatenate(seen), minlength=TOKENS)
    assert counts.max() == 1 and (counts == 0).sum() == (TOKENS - 8 * quarter) % 32
    # Text that is adjacent in the data stays so: a join is where two labels are not adjacent.
    joins = sum(int((np.diff(labels) % TOKENS != 1).sum()) for labels in seen)
    assert long.recut is not None and f"up to {long._left.joins}" in long.recut
    assert 0 < joins <= long._left.joins < quarter + 1


def test_a_position_keeps_lengths_and_reads_what_earlier_versions_wrote() -> None:
    position = Position().after(3, sequence=8).after(2, sequence=8).after(4, sequence=16)
    assert position.pairs == ((8, 5), (16, 4)) and position.samples == 9
    assert position.split(16) == (Position((Taken(8, 5),)), 4) and position.split(8) == (
        position,
        0,
    )
    assert Position.from_json(position.to_json()) == position
    old = Position.from_json({"consumed_samples": 320})
    assert old.measured(64) == Position((Taken(64, 320),)) and old.samples == 320
    assert Position.from_json({"consumed_samples": 0}) == Position()
    for taken in ([[8, 4]], [[8, 6], [0, 3]], [[8, 12], [8, -3]], [8]):
        with pytest.raises((ValueError, TypeError)):
            Position.from_json({"consumed_samples": 9, "taken": taken})


def test_a_wrong_id_is_found_in_an_epoch_cut_anew(tmp_path):
    """Samples after a change of length are read token by token; their ids are checked too."""
    prefix = tmp_path / "wrong"
    with IndexedWriter(prefix, "uint16") as writer:
        writer.add_document(np.full(200, 7))
    data = IndexedDataset(prefix, vocabulary=7)
    index = SampleIndex(data, 8, seed=1, before=((4, 3),))
    with pytest.raises(DataError, match="does not have, in sample 0"):
        index.sample(0)
