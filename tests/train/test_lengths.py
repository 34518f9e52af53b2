"""Runs whose sample length changes: every token once, through rollback and resume."""

import json

import numpy as np
import pytest

from megagrow.checkpoint import NativeCheckpoint, step_path
from megagrow.config.load import load_config
from megagrow.data.dataset import open_dataset
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.position import Position, Taken
from megagrow.data.run_data import open_data
from megagrow.data.sampler import SampleIndex
from megagrow.train.agreement import check_agreement
from megagrow.train.run_plan import plan_run
from tests.jobs import events, launch, log_of, settings, train, trajectory, write_config
from tests.train.runs import spoil_losses

STAGES = [
    {"until": {"steps": 4}, "sequence": 4},
    {"until": {"steps": 9}, "sequence": 8, "batch": {"global": 4, "micro": 2}},
]


def _note_and_spoil(rank, directory, bad):
    """Record which sample of which order every read was; make the losses of some steps infinite."""
    sample = SampleIndex.sample

    def noted(index, k):
        with open(directory / "samples", "a", encoding="utf-8") as stream:
            stream.write(json.dumps([index.sequence, index.seed, index.before, k]) + "\n")
        return sample(index, k)

    SampleIndex.sample = noted
    spoil_losses(rank, 0, bad, float("inf"))


@pytest.fixture
def config(dataset, tmp_path):
    mapping = settings(dataset, tmp_path / "run", stages=STAGES,
        checkpoint={"every": 4}, recovery={"skip": 1})  # fmt: skip
    return write_config(tmp_path / "run.yaml", mapping)


def test_a_run_that_goes_back_over_a_change_of_length_sees_no_token_twice(
    config, dataset, tmp_path
):
    """Steps 6 and 7 are bad, so it goes back to step 4, where samples are short."""
    [[outcome]] = launch(1, ["--config", config], hook=(_note_and_spoil, tmp_path, {6, 7}))
    assert outcome.status == 0, outcome.err
    assert "samples have 8 tokens from here on" in outcome.err
    [back] = events(log_of(config), "rollback")
    assert (back["step"], back["from_step"]) == (4, 6)
    state = NativeCheckpoint.open(step_path(tmp_path / "run" / "checkpoints", 9)).run_state
    assert state["taken"] == [[4, 4 * 8], [8, 3 * 4 + 5 * 4]] and state["consumed_samples"] == 64
    # The same reads on data in which every token is its own index.
    total = open_dataset(dataset, None).train.total_tokens
    with IndexedWriter(tmp_path / "numbered", "int32") as writer:
        writer.add_document(range(total))
    data = IndexedDataset(tmp_path / "numbered")
    seen = np.zeros(total, np.int64)
    for line in (tmp_path / "samples").read_text().splitlines():
        sequence, seed, before, k = json.loads(line)
        index = SampleIndex(data, sequence, seed, tuple(map(tuple, before)))
        np.add.at(seen, index.sample(k)[1:], 1)
    assert seen.max() == 1 and seen.sum() == 32 * 4 + 32 * 8


def test_resumed_on_either_side_of_a_change_of_length_the_run_is_the_same(config, tmp_path):
    whole = train(1, config)
    parts = ["--config", config, f"run.dir={tmp_path / 'parts'}"]
    stops = [[*parts, f"train.stop_after_steps={stop}"] for stop in (3, 4, 6)]
    outcomes = launch(1, *stops, parts)
    assert all(o.status == 0 for [o] in outcomes), outcomes[-1][0].err
    assert trajectory(log_of(config, parts[-1])) == trajectory(whole)


def test_a_checkpoint_that_counts_samples_without_their_length_goes_on_as_it_would_have(config):
    """As written by earlier versions, which continued at the same number in the new order."""
    train(1, config, "train.stop_after_steps=6")
    run = load_config(config)
    data = open_data(run)
    plan = plan_run(run, world=1, vocabulary=data.vocab_size)
    for step, stage, length in ((4, 0, 4), (6, 1, 8)):
        path = step_path(config.parent / "run" / "checkpoints", step)
        checkpoint = NativeCheckpoint.open(path)
        assert checkpoint.run_state.pop("taken") and checkpoint.run_state["growth_stage"] == stage
        state, changes = check_agreement(checkpoint, config=run, data=data, plan=plan)
        count = checkpoint.run_state["consumed_samples"]
        assert state.position == Position((Taken(length, count),))
        said = [line for line in changes if line.startswith("data position")]
        assert len(said) == (stage == 1)
