"""The mean of a run's last weights: its arithmetic, and what the run reports."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from megagrow.config.loop import AverageConfig
from megagrow.state.boxes import whole
from megagrow.train.average import WeightAverage
from tests.jobs import events, launch, log_of, settings, write_config


class FakeEngine:
    """Two shards, and a count of publishes."""

    def __init__(self):
        self.values = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
        self.published, self.comm = 0, SimpleNamespace(rank=0)
        self.placement = SimpleNamespace(shards=self._shards)
        self.state = SimpleNamespace(view=lambda tensor, slot, box: self.values[tensor])

    def _shards(self, rank):
        return [SimpleNamespace(tensor=name, box=whole(tuple(v.shape)))
                for name, v in self.values.items()]  # fmt: skip

    def set(self, value):
        for tensor in self.values.values():
            tensor.fill_(value)

    def publish(self):
        self.published += 1


@given(steps=st.integers(1, 200), last=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_the_mean_is_of_every_so_many_of_the_last_steps(steps, last, seed):
    values = np.random.default_rng(seed).normal(0, 10, steps)
    engine, average = FakeEngine(), WeightAverage(AverageConfig(last=last))
    for step in range(1, steps + 1):
        engine.set(values[step - 1])
        average.after_step(engine, step=step, total_steps=steps)
    window = max(1, round(last * steps))
    every = -(-window // 64)
    taken = [values[step - 1] for step in range(steps, steps - window, -every)]
    assert average.count == average.wanted(steps) == len(taken) <= 64
    with average.in_place(engine):
        for held in engine.values.values():
            assert held.numpy() == pytest.approx(sum(taken) / len(taken), abs=1e-4)
        assert engine.published == 1
    assert all((v == np.float32(values[steps - 1])).all() for v in engine.values.values())
    assert engine.published == 2


def test_without_the_section_nothing_is_kept():
    average = WeightAverage(None)
    average.after_step(FakeEngine(), step=10, total_steps=10)
    assert average.count == 0 == average.wanted(10)


def run(tmp_path, dataset, name, *, world=1, zero=0, **changes):
    changes.setdefault("train", {"average": {"last": 0.3}})
    mapping = settings(dataset, tmp_path / name, layout={"zero": zero}, **changes)
    path = write_config(tmp_path / f"{name}.yaml", mapping)
    [outcomes] = launch(world, ["--config", path])
    assert all(one.status == 0 for one in outcomes), outcomes[0].err
    return path


def test_a_run_is_the_same_and_its_average_is_better_founded(tmp_path, dataset):
    plain = run(tmp_path, dataset, "plain", train={})
    path = run(tmp_path, dataset, "average")
    assert [line["loss"] for line in events(log_of(path), "step")] == [
        line["loss"] for line in events(log_of(plain), "step")
    ]
    assert not events(log_of(plain), "average")
    [line] = events(log_of(path), "average")
    final = events(log_of(path), "validation")[-1]
    assert (line["step"], line["states"], line["wanted"]) == (10, 3, 3)
    assert line["val_loss"] != final["val_loss"]
    assert abs(line["val_loss"] - final["val_loss"]) < 0.1
    # The last weights are saved, so a run that resumes from there is unaffected.
    saved = [
        load_file(tmp_path / name / "checkpoints/step_00000010/rank_00000.safetensors")
        for name in ("plain", "average")
    ]
    assert all((saved[0][key] == saved[1][key]).all() for key in saved[0] | saved[1])
    # A mean of one state is that state.
    one = run(tmp_path, dataset, "one", train={"average": {"last": 0.01}})
    [line] = events(log_of(one), "average")
    assert line["val_loss"] == events(log_of(one), "validation")[-1]["val_loss"]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_layout_has_the_same_average(tmp_path, dataset, zero):
    losses = []
    for name, world in (("alone", 1), ("two", 2)):
        path = run(tmp_path, dataset, name, world=world, zero=zero if world > 1 else 0)
        losses.append(events(log_of(path), "average")[0]["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_that_is_resumed_within_the_window_says_so(tmp_path, dataset):
    mapping = settings(dataset, tmp_path / "run", layout={"zero": 0},
                       train={"average": {"last": 0.3}})  # fmt: skip
    path = write_config(tmp_path / "run.yaml", mapping)
    [[stopped], [resumed]] = launch(
        1, ["--config", path, "train.stop_after_steps=9"], ["--config", path]
    )
    assert stopped.status == resumed.status == 0 and "mean of" not in stopped.err
    assert "mean of 1 states (of 3: the run was resumed among them)" in resumed.err
    [line] = events(log_of(path), "average")
    assert (line["states"], line["wanted"]) == (1, 3)
