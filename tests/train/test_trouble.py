"""Trouble while a run goes on: numbers that are not finite, a disk that takes no more."""

import dataclasses
import os
import resource
import subprocess
from pathlib import Path

import pytest
from jobs import events, files_below, launch, log_of, settings, train, trajectory, write_config

from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path


@pytest.fixture
def config(tmp_path, dataset):
    return write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))


def sound(root):
    """The steps of all checkpoints, each of them read and compared with its checksums."""
    for step in list_steps(root):
        NativeCheckpoint.open(step_path(root, step)).verify()
    assert not list(root.glob("*.tmp-*"))
    return list_steps(root)


def test_a_learning_rate_that_is_far_too_high(tmp_path, config):
    """It diverges all by itself."""
    [outcomes] = launch(
        2, ["--config", config, "optimizer.lr=1e6", "optimizer.grad_clip=0", "schedule.warmup=0"]
    )
    assert [o.status for o in outcomes] == [1, 1]
    error = outcomes[0].err
    assert error.count("error: ") == 1 and outcomes[1].err == ""
    assert "is not finite" in error and "optimizer.lr" in error and "--resume" not in error
    sound(tmp_path / "run" / "checkpoints")


def _spoil(rank, bad_rank, step, changes):
    """Let the result of one rank's step be another."""
    from megagrow.train import loop

    start = loop.start_engine
    if rank != bad_rank:
        return

    def spoiled_start(**arguments):
        engine = start(**arguments)
        train_step = engine.train_step

        def spoiled(*args, **kwargs):
            nonlocal step
            step -= 1
            result = train_step(*args, **kwargs)
            return dataclasses.replace(result, **changes) if step == 0 else result

        engine.train_step = spoiled
        return engine

    loop.start_engine = spoiled_start


@pytest.mark.parametrize(
    ("rank", "changes", "says"),
    [
        (1, {"loss": float("nan")}, ["loss of step 3", "nan on rank 1"]),
        (0, {"loss": float("-inf")}, ["loss of step 3", "-inf on rank 0"]),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank(tmp_path, config, rank, changes, says):
    """The step, the rank and the last good checkpoint are named, on rank 0 alone."""
    [outcomes] = launch(2, ["--config", config], hook=(_spoil, rank, 3, changes))
    assert [o.status for o in outcomes] == [1, 1]
    last = step_path(tmp_path / "run" / "checkpoints", 2)
    for words in [*says, str(last), "optimizer.lr", "schedule.warmup"]:
        assert words in outcomes[0].err
    assert outcomes[1].err == ""
    assert sound(last.parent) == [2]
    lines = log_of(config)
    assert [line["step"] for line in events(lines, "step")] == [1, 2]
    assert events(lines, "not_finite")
    # What it says to do works.
    assert train(2, config)[-1]["event"] == "end"


def test_a_gradient_that_is_not_finite(tmp_path, config):
    """Else ZeRO 1 and 2 would pass over the step, and ZeRO 0 would take it."""
    hook = (_spoil, 0, 3, {"grad_norm": float("inf")})
    [[outcome]] = launch(1, ["--config", config], hook=hook)
    assert outcome.status == 1 and "gradient of step 3" in outcome.err
    assert str(step_path(tmp_path / "run" / "checkpoints", 2)) in outcome.err


def _poison(rank, step):
    """Put an infinity into the weights before the save of a step."""
    from megagrow.train import checkpoints

    save_run = checkpoints.save_run

    def poisoned(*, engine, state, **more):
        if state.step == step and rank == 1:
            shard = next(iter(engine.placement.written_by(rank)))
            engine.state.view(shard.tensor, "master", shard.box).view(-1)[0] = float("inf")
        return save_run(engine=engine, state=state, **more)

    checkpoints.save_run = poisoned


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
    """The system refuses a write in the middle of a save: the earlier checkpoints stay."""
    train(1, config, "train.stop_after_steps=3")
    root = tmp_path / "run" / "checkpoints"
    before = files_below(root)
    hook = (_limit_files, 90_000)  # the small state fits, the grown one does not
    [[outcome]] = launch(1, ["--config", config], hook=hook)
    assert outcome.status == 1 and outcome.err.count("error: ") == 1
    for words in ("step_00000004: not saved", "earlier checkpoints are as they were", "EFBIG"):
        assert words in outcome.err
    assert files_below(root) == before and sound(root) == [2, 3]
    whole = train(1, config, f"run.dir={tmp_path / 'straight'}")
    assert trajectory(train(1, config)) == trajectory(whole)


def test_a_log_that_may_not_grow(tmp_path, config):
    train(1, config, "train.stop_after_steps=3")
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    hook = (_limit_files, size + 900)
    [[outcome]] = launch(1, ["--config", config, "checkpoint.every=9"], hook=hook)
    assert outcome.status == 1 and outcome.err.count("error: ") == 1
    assert "metrics.jsonl" in outcome.err and "--resume auto" in outcome.err
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
        steps = sound(disk / "run" / "checkpoints")
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
        # With fewer checkpoints kept there is room, and the run goes on to its end.
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        lines = train(2, config, f"run.dir={disk / 'run'}", "checkpoint.keep=2")
        assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert os.listdir(disk) == [] and Path(config).exists()
