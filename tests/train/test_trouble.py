"""Trouble during a run: a full disk, signals, numbers that are not finite."""

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from tests.jobs import (
    events,
    files_below,
    launch,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)


@pytest.fixture
def config(tmp_path, dataset):
    return write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))


def sound(root):
    """The steps of all checkpoints, each read and checked against its checksums."""
    for step in list_steps(root):
        NativeCheckpoint.open(step_path(root, step)).verify()
    assert not list(root.glob("*.tmp-*"))
    return list_steps(root)


def _poison(rank, step):
    """Put an infinity into the weights before the save of a step."""
    from megagrow.train.saving import Saver

    save = Saver.save

    def poisoned(self, engine, state, **more):
        if state.step == step and rank == 1:
            shard = next(iter(engine.placement.written_by(rank)))
            engine.state.view(shard.tensor, "master", shard.box).view(-1)[0] = float("inf")
        return save(self, engine, state, **more)

    Saver.save = poisoned


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, config):
    [outcomes] = launch(2, ["--config", config, "layout.zero=2"], hook=(_poison, 3))
    assert [o.status for o in outcomes] == [1, 1]
    assert "step_00000003: not saved" in outcomes[0].err and outcomes[1].err == ""
    assert "rank 1: master of" in outcomes[0].err and "is not finite" in outcomes[0].err
    assert sound(tmp_path / "run" / "checkpoints") == [2]


def test_a_file_in_the_place_of_the_run_directory(tmp_path, config):
    (tmp_path / "run").write_text("mine")
    [outcomes, below] = launch(
        2, ["--config", config], ["--config", config, f"run.dir={tmp_path / 'run' / 'below'}"]
    )
    for first, second in (outcomes, below):
        assert (first.status, second.status) == (1, 1) and second.err == ""
        assert "error: run.dir" in first.err and "set run.dir to another" in first.err
    assert (tmp_path / "run").read_text() == "mine"


def _limit_files(_, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_files_that_may_not_grow(tmp_path, config):
    """The system refuses a write in the middle of a save: the earlier checkpoints remain."""
    train(1, config, "train.stop_after_steps=3")
    root = tmp_path / "run" / "checkpoints"
    before = files_below(root)
    hook = (_limit_files, 90_000)  # the small state fits, the grown one does not
    [[outcome]] = launch(1, ["--config", config], hook=hook)
    assert outcome.status == 1 and outcome.err.count("error: ") == 1
    for step in ("04", "06", "07", "08", "10"):
        assert f"step_000000{step}: not saved" in outcome.err
    assert outcome.err.count("The run continues") == 4 and "EFBIG" in outcome.err
    assert str(step_path(root, 3)) in outcome.err  # the last good one
    assert files_below(root) == before and sound(root) == [2, 3]
    whole = train(1, config, f"run.dir={tmp_path / 'straight'}")
    assert trajectory(train(1, config)) == trajectory(whole)


def test_a_log_that_may_not_grow(tmp_path, config):
    train(1, config, "train.stop_after_steps=3")
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    hook = (_limit_files, size + 900)
    [[outcome]] = launch(1, ["--config", config, "checkpoint.every=9"], hook=hook)
    assert outcome.status == 1 and outcome.err.count("error: ") == 1
    assert "warning: cannot write the run's log" in outcome.err
    assert "metrics.jsonl" in outcome.err and "kept in memory" in outcome.err
    lines = train(1, config)
    assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))


def test_a_full_disk(tmp_path, config):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    try:
        [outcomes] = launch(
            2, ["--config", config, f"run.dir={disk / 'run'}", "checkpoint.every=1",
                "checkpoint.keep=50"]
        )  # fmt: skip
        assert [o.status for o in outcomes] == [1, 1]
        error = outcomes[0].err
        assert "not saved" in error and "disk space" in error and "checkpoint.keep" in error
        # It trained to its end; it fails only because it could not save the end.
        assert "step 10/10" in error and "The run continues" in error
        steps = sound(disk / "run" / "checkpoints")
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
        # With fewer checkpoints kept there is space, and the run continues to its end.
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        lines = train(2, config, f"run.dir={disk / 'run'}", "checkpoint.keep=2")
        assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert os.listdir(disk) == [] and Path(config).exists()


# --- requests to stop ---------------------------------------------------------------------


def losses_of(lines):
    """Validation losses by step, since a rule may end a stage by them."""
    return {line["step"]: line["val_loss"] for line in events(lines, "validation")}


def _signal(rank, bad_rank, step, number):
    """Send a rank a signal in the middle of a step."""
    from megagrow.engine.engine import Engine

    train_step = Engine.train_step

    def interrupted(self, *args, **more):
        nonlocal step
        step -= 1
        if step == 0 and rank == bad_rank:
            os.kill(os.getpid(), number)
        return train_step(self, *args, **more)

    Engine.train_step = interrupted


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_to_one_rank_saves_the_run_and_tells_who_asked(tmp_path, config, number, status):
    """Schedulers restart a job on 75, but not what a person interrupted (130)."""
    often = "train.validate_every=5"  # due after the step that the signal comes in
    command = ["--config", config, "checkpoint.every=100", often]
    [outcomes] = launch(2, command, hook=(_signal, 1, 5, number))
    assert [o.status for o in outcomes] == [status, status]
    said = outcomes[0].err
    assert f"stopped by {number.name} at step 5 of 10" in said and "step_00000005" in said
    assert f"return code = {status}" in said and "which it is not" in said
    root = tmp_path / "run" / "checkpoints"
    assert sound(root)[-1] == 5
    assert log_of(config)[-1]["reason"] == number.name
    whole = train(2, config, f"run.dir={tmp_path / 'straight'}", often)
    resumed = train(2, config, often)
    assert trajectory(resumed) == trajectory(whole)
    assert losses_of(resumed) == losses_of(whole) and 5 in losses_of(whole)


def _signal_in(_, places):
    """Send the process SIGINT at the n-th call of these functions, one after the other."""
    from megagrow.train import loop, run

    def interrupting(owner, name, count):
        function = getattr(owner, name)

        def called(*args, **more):
            if places and places[0] == (name, count):
                places.pop(0)
                os.kill(os.getpid(), signal.SIGINT)
            elif places and places[0][0] == name:
                places[0] = (name, places[0][1] - 1)
            return function(*args, **more)

        setattr(owner, name, called)

    for owner, name in ((run, "start_engine"), (loop, "grow"), (loop.Trainer, "_validate")):
        interrupting(owner, name, 1)


def test_ctrl_c_is_kept_for_the_next_safe_point_and_what_is_said_of_checkpoints_is_true(
    tmp_path, config
):
    """During engine creation, a validation, and a growth; then the run finishes."""
    command = ["--config", config, "checkpoint.every=100"]
    hook = (_signal_in, [("start_engine", 1), ("_validate", 3), ("grow", 1)])
    [[starting], [validating], [growing], [last]] = launch(1, *[command] * 4, hook=hook)
    assert [o.status for o in (starting, validating, growing, last)] == [130, 130, 130, 0]
    assert "at step 0 of 10; it has no checkpoint" in starting.err
    assert "checkpoint: none" in starting.err and "continues" not in starting.err
    # At 0, at 3 before the growth, and at 4.
    assert "at step 4 of 10; its last checkpoint" in validating.err
    assert "step_00000004" in validating.err
    # The growth after step 7, and the first step of the grown model.
    assert "at step 8 of 10" in growing.err and "step_00000008" in growing.err
    assert sound(tmp_path / "run" / "checkpoints")[-1] == 10
    lines = log_of(config)
    assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))
    whole = train(1, config, f"run.dir={tmp_path / 'straight'}")
    assert trajectory(lines) == trajectory(whole)
