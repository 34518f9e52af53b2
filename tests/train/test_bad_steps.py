"""Losses and gradients that are not finite: skipped, rolled back from, given up on.

The numbers are corrupted inside the model, so that DeepSpeed reacts for real.
"""

import math
import shutil

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from megagrow.state.boxes import whole
from tests.jobs import events, launch, log_of, settings, train, trajectory, write_config
from tests.train.runs import spoil_losses

NEVER = ["recovery.skip=0", "recovery.rollback=0"]


@pytest.fixture
def config(tmp_path, dataset):
    return write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))


def masters(path):
    checkpoint = NativeCheckpoint.open(path)
    return {t.name: checkpoint.read(t.name, "master", whole(t.shape)) for t in checkpoint.catalog}


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [(2, {"zero": zero}, "fp32") for zero in range(4)]
    + [(2, {"zero": 1, "pipeline": 2}, "fp32")]
    + [(1, {"zero": zero}, "bf16") for zero in (0, 1, 3)],
    ids=lambda value: str(value),
)
def test_a_bad_step_leaves_no_update(tmp_path, dataset, world, layout, dtype):
    mapping = settings(
        dataset, tmp_path / "run", layout=layout, checkpoint={"every": 1, "keep": 9},
        precision={"dtype": dtype},
    )  # fmt: skip
    config = write_config(tmp_path / "run.yaml", mapping)
    bad_rank = world - 1  # the last pipeline stage computes the loss
    spoil = (spoil_losses, bad_rank, {3}, math.nan)
    command = ["--config", config, "train.stop_after_steps=5"]
    [outcomes] = launch(world, command, hook=spoil)
    assert [o.status for o in outcomes] == [0] * world, outcomes[0].err
    assert "step 3 is skipped" in outcomes[0].err
    lines = log_of(config)
    assert [line["step"] for line in events(lines, "passed_over")] == [3]
    good = events(lines, "step")
    assert [line["step"] for line in good] == [1, 2, 4, 5]
    assert all(math.isfinite(line["loss"]) for line in good)
    root = tmp_path / "run" / "checkpoints"
    before, after = (masters(step_path(root, step)) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert NativeCheckpoint.open(step_path(root, 5)).run_state["optimizer_step"] == 4


def test_spikes_are_passed_over_where_asked_for(tmp_path, config):
    spoil = (spoil_losses, 0, {9}, 50.0)
    straight, spike = (f"run.dir={tmp_path / name}" for name in ("straight", "spike"))
    common = ["--config", config, "stages=[{until: {steps: 10}}]"]
    [[one]] = launch(1, [*common, straight], hook=spoil)
    [[two]] = launch(1, [*common, spike, "recovery.spike=3"], hook=spoil)
    assert one.status == two.status == 0, two.err
    assert events(log_of(config, straight), "passed_over") == []
    [line] = events(log_of(config, spike), "passed_over")
    assert line["step"] == 9 and "over 3 times the recent" in line["why"]


def test_too_many_bad_steps_in_a_row_go_back_to_a_checkpoint(tmp_path, config):
    """Steps 5 and 6 are bad; back to the checkpoint of 4, and on after their samples."""
    command = ["--config", config, "recovery.skip=1"]
    [outcomes] = launch(2, command, hook=(spoil_losses, 1, {5, 6}, math.nan))
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    error = outcomes[0].err
    assert "step 5 is skipped" in error and "step 6: the loss is not finite" in error
    assert "the run rolls back to" in error and "step_00000004" in error
    lines = log_of(config)
    [back] = events(lines, "rollback")
    assert (back["step"], back["from_step"]) == (4, 5) and back["ranks"] == ["nan on rank 1"]
    assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))
    root = tmp_path / "run" / "checkpoints"
    state = NativeCheckpoint.open(step_path(root, 10)).run_state
    assert state["consumed_samples"] == (10 + 2) * 8
    # Stopped after the rollback and resumed, it is the same run.
    stopped = [*command, f"run.dir={tmp_path / 'stopped'}"]
    launch(2, [*stopped, "train.stop_after_steps=7"], hook=(spoil_losses, 1, {5, 6}, math.nan))
    assert trajectory(train(2, config, *stopped[2:])) == trajectory(lines)


def test_a_run_gives_up_in_the_end(tmp_path, config):
    command = ["--config", config, "recovery.skip=1", "layout.zero=0"]
    [outcomes] = launch(2, command, hook=(spoil_losses, 1, set(range(3, 99)), math.nan))
    assert [o.status for o in outcomes] == [1, 1] and outcomes[1].err == ""
    error = outcomes[0].err
    last = step_path(tmp_path / "run" / "checkpoints", 4)
    assert error.count("error: ") == 1
    for words in ("step 5: the loss is not finite", "nan on rank 1", str(last), "optimizer.lr",
                  "recovery.rollback", "schedule.warmup"):  # fmt: skip
        assert words in error
    assert list_steps(last.parent)[-1] >= 2
    assert events(log_of(config), "not_finite")
    # Its suggested fix works.
    assert train(2, config)[-1]["event"] == "end"


def _spoil_validation(rank, steps):
    """Validations are not finite after these numbers of steps."""
    from megagrow.train.loop import Trainer

    losses_of = Trainer._losses

    def spoiled(self, data):
        found = losses_of(self, data)
        return {name: math.nan if self.state.step in steps else x for name, x in found.items()}

    Trainer._losses = spoiled


def test_a_validation_at_the_start_that_is_not_finite(tmp_path, config):
    """Fresh weights have nothing to roll back to; a resumed run rolls back, or gives up."""
    [[outcome]] = launch(1, ["--config", config], hook=(_spoil_validation, {0}))
    assert outcome.status == 1 and "validation loss after step 0 is not finite" in outcome.err
    assert outcome.err.count("error: ") == 1 and "Traceback" not in outcome.err
    assert list_steps(tmp_path / "run" / "checkpoints") == []
    # Asked to stop right after step 4, a run exits without validating; the next one makes up
    # for it, and there the numbers are bad.
    stopped = [f"run.dir={tmp_path / 'stopped'}", "checkpoint.every=3"]
    [[first]] = launch(1, ["--config", config, *stopped], hook=(_asked_to_stop, 4))
    assert first.status != 0 and events(log_of(config, *stopped), "step")[-1]["step"] == 4
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "stopped", again)
    command, spoil = ["--config", config, *stopped], (_spoil_validation, {4})
    [[second]] = launch(1, [*command, "recovery.rollback=0"], hook=spoil)
    assert second.status == 1 and "validation loss after step 4 is not finite" in second.err
    # With a rollback left it goes back to step 4 itself, and on after its data.
    [[third]] = launch(1, [*command, f"run.dir={again}"], hook=spoil)
    assert third.status == 0, third.err
    assert [line["step"] for line in events(log_of(config, f"run.dir={again}"), "rollback")] == [4]


def _asked_to_stop(rank, step):
    """Simulate a SIGTERM during a step."""
    import signal

    from megagrow.train.loop import Trainer

    guarded = Trainer._step

    def step_and_ask(self):
        if self.state.step + 1 == step:
            self.stop_request.signal = signal.SIGTERM
        guarded(self)

    Trainer._step = step_and_ask


def test_nothing_to_go_back_to(tmp_path, config):
    [[outcome]] = launch(1, ["--config", config, *NEVER], hook=(spoil_losses, 0, {1}, math.inf))
    assert outcome.status == 1 and "none was saved yet" in outcome.err
    assert list_steps(tmp_path / "run" / "checkpoints") == []


def test_a_learning_rate_that_is_far_too_high(tmp_path, config):
    """It diverges by itself, also on a second attempt."""
    [outcomes] = launch(
        2, ["--config", config, "optimizer.lr=1e6", "optimizer.grad_clip=0", "schedule.warmup=0"]
    )
    assert [o.status for o in outcomes] == [1, 1]
    error = outcomes[0].err
    assert error.count("error: ") == 1 and outcomes[1].err == ""
    assert "is not finite" in error and "optimizer.lr" in error and "--resume" not in error
    root = tmp_path / "run" / "checkpoints"
    for step in list_steps(root):
        NativeCheckpoint.open(step_path(root, step)).verify()
