"""Mixtures: shares, order, positions in each source, sources that are over."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.config.data import DataConfig
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.mixture import PERIOD, Mixture
from megagrow.data.position import Position
from megagrow.data.run_data import MixtureSource, RunData
from megagrow.errors import ConfigError, DataError

SIZES = {"a": 1003, "b": 400, "c": 77}
FIRST = {"a": 0, "b": 2000, "c": 3000}  # id of the first token: no two sources have one in common

weights = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6)


def mixture(*values: float) -> Mixture:
    return Mixture.of({chr(ord("a") + i): value for i, value in enumerate(values)})


@given(values=weights)
def test_shares_are_the_weights_to_one_sample_in_a_period(values: list[float]) -> None:
    found = mixture(*values)
    for (_, count), value in zip(found.slots, values, strict=True):
        assert abs(count - value / sum(values) * PERIOD) < 1 + 1e-6


@settings(max_examples=10, deadline=None)
@given(values=weights, start=st.integers(0, 3 * PERIOD))
def test_any_run_of_samples_has_the_shares(values: list[float], start: int) -> None:
    """And each source's samples come in order, none left out."""
    found = mixture(*values)
    before = found.taken(start)
    numbers: dict[str, list[int]] = {name: [] for name in found.names}
    for k in range(start, start + 300):
        index, number = found.at(k)
        numbers[found.names[index]].append(number)
    after = found.taken(start + 300)
    for name, count in found.slots:
        assert numbers[name] == list(range(before[name], after[name]))
        assert abs(len(numbers[name]) - 300 * count / PERIOD) < len(values) + 1


@settings(max_examples=10, deadline=None)
@given(values=weights, number=st.integers(0, 2 * PERIOD))
def test_the_place_of_a_sample_is_where_it_comes(values: list[float], number: int) -> None:
    found = mixture(*values)
    for index in range(len(values)):
        assert found.at(found.last(index, number)) == (index, number)


def test_realised_shares_deviate_less_than_a_draw_would() -> None:
    found = mixture(0.7, 0.2, 0.1)
    worst = max(
        abs(found.taken(n)[name] - n * found.share(name)) for n in range(2000) for name in "abc"
    )
    assert worst <= 1.5


def test_a_share_that_no_period_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="a weight is too small"):
        mixture(1.0, 1e-7)


def make(path: Path) -> dict[str, Any]:
    """Three datasets whose tokens tell where they are from."""
    path.mkdir(exist_ok=True)
    made = {}
    for name, size in SIZES.items():
        with IndexedWriter(path / name, "int32") as writer:
            writer.add_document(range(FIRST[name], FIRST[name] + size))
        made[name] = SimpleNamespace(fingerprint=name, train=IndexedDataset(path / name))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(tmp_path_factory.mktemp("data"))


def run_of(data: dict[str, Any], *stages: dict[str, float], **more: Any) -> RunData:
    """A run whose stages have these weights."""
    sources = [
        tuple(MixtureSource(name, data[name], weight, **more) for name, weight in stage.items())
        for stage in stages
    ]
    config = DataConfig.model_validate({"sources": [{"path": "x", "weight": 1.0}]})
    return RunData(config, tuple(sources))


def walk(
    run: RunData, stages: list[tuple[int, int]], *, batch: int = 1
) -> tuple[list[np.ndarray], Position]:
    """All samples of a run, stage by stage: (tokens of a sample, steps)."""
    position, found = Position(), []
    for stage, (sequence, steps) in enumerate(stages):
        for step in range(steps):
            samples, _ = run.samples_for(
                stage, sequence, seed=3, position=position, batch=batch, inside=step > 0
            )
            done = position.split(sequence, samples.mixture)[1]
            found += list(samples.batch(done, batch))
            position = position.after(batch, sequence=sequence, mixture=samples.mixture)
            position = Position.from_json(position.to_json())  # as a resume does
    return found, position


STAGES = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 5.0), min_size=1),
        st.integers(1, 40),
        st.integers(0, 12),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stages=STAGES)
def test_no_token_is_seen_twice_in_a_pass_whatever_the_mixtures_and_lengths(
    data: dict[str, Any], stages: list[tuple[dict[str, float], int, int]]
) -> None:
    run = run_of(data, *(weights for weights, _, _ in stages))
    found, position = walk(run, [(sequence, steps) for _, sequence, steps in stages])
    labels = np.concatenate([sample[1:] for sample in found] or [np.empty(0, np.int64)])
    seen = run.tokens_seen(position)
    for name, size in SIZES.items():
        mine = labels[(labels >= FIRST[name]) & (labels < FIRST[name] + size)] - FIRST[name]
        assert len(mine) == seen.get(name, 0)
        # A pass leaves out fewer tokens than one sample, so there may be one more of them.
        longest = max((sequence for _, sequence, _ in stages), default=1)
        passes = -(-len(mine) // max(1, size - longest))
        assert np.bincount(mine, minlength=size).max() <= max(1, passes)


def test_samples_do_not_depend_on_what_comes_after(data: dict[str, Any]) -> None:
    first = {"a": 0.6, "b": 0.4}
    one, _ = walk(run_of(data, first, {"c": 1.0}), [(8, 20), (16, 5)])
    two, _ = walk(run_of(data, first, {"a": 1.0, "c": 3.0}), [(8, 20), (4, 9)])
    assert all(map(np.array_equal, one[:20], two[:20]))


def test_the_batch_does_not_change_the_order(data: dict[str, Any]) -> None:
    run = run_of(data, {"a": 0.6, "b": 0.3, "c": 0.1})
    one, _ = walk(run, [(8, 24)])
    two, _ = walk(run, [(8, 4)], batch=6)
    assert all(map(np.array_equal, one, two))


def test_the_order_of_sources_in_the_configuration_does_not_matter(data: dict[str, Any]) -> None:
    one, _ = walk(run_of(data, {"a": 2.0, "c": 1.0}), [(8, 24)])
    two, _ = walk(run_of(data, {"c": 0.5, "a": 1.0}), [(8, 24)])
    assert all(map(np.array_equal, one, two))


def test_a_source_that_is_over_is_dropped_or_ends_the_run(data: dict[str, Any]) -> None:
    """c has 9 windows of 8 tokens; its tenth would be sample 95."""
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    dropping = run_of(data, weights, epochs=1.0, drop=True)
    found, position = walk(dropping, [(8, 110)])
    names = ["c" if sample[0] >= 3000 else "b" if sample[0] >= 2000 else "a" for sample in found]
    assert names.count("c") == 9 and "c" not in names[86:]
    assert abs(names[95:].count("a") - 15 * 2 / 3) <= 1
    labels = np.concatenate([sample[1:] for sample in found])
    assert np.bincount(labels).max() == 1
    assert [part.samples for part in position.taken] == [95, 15]
    with pytest.raises(DataError, match=r"(?s)c is over.*at_end: drop"):
        walk(run_of(data, weights, epochs=1.0), [(8, 110)])
    with pytest.raises(DataError, match="is over"):
        walk(run_of(data, {"c": 1.0}, epochs=1.0, drop=True), [(8, 10)])
    assert len(walk(run_of(data, weights, epochs=2.0), [(8, 110)])[0]) == 110


def test_one_source_of_a_mixture_has_the_samples_that_it_has_alone(data: dict[str, Any]) -> None:
    mixed, _ = walk(run_of(data, {"a": 0.5, "b": 0.5}), [(8, 40)])
    alone, _ = walk(run_of(data, {"a": 1.0}), [(8, 20)])
    assert all(map(np.array_equal, [s for s in mixed if s[0] < 2000], alone))


def test_a_position_that_is_damaged_is_refused() -> None:
    good = Position().after(5, sequence=8, mixture=mixture(1.0, 2.0)).to_json()
    assert Position.from_json(good).to_json() == good
    for change in ({"mixtures": []}, {"taken": [[8, 5, 1]]}, {"mixtures": [[["a", 3]]]}):
        with pytest.raises(ValueError, match=r"mixture|slots"):
            Position.from_json({**good, **change})
