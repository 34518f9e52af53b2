"""Asynchronous saves: the run is the same, steps overlap with writing, nothing is lost."""

import errno
import itertools
import os
import sys
import threading

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from megagrow.state.boxes import whole
from tests.jobs import (
    events,
    growths,
    killed_launch,
    launch,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)


@pytest.fixture(scope="module", name="straight")
def saved_in_the_foreground(tmp_path_factory, dataset):
    """A run with a checkpoint per step, none asynchronous: (its configuration, its log)."""
    base = tmp_path_factory.mktemp("straight")
    mapping = settings(dataset, base / "run", checkpoint={"every": 1, "keep": 20})
    config = write_config(base / "run.yaml", mapping)
    return config, train(2, config)


BESIDE = "checkpoint.asynchronous=true"


def sound(root):
    for step in list_steps(root):
        NativeCheckpoint.open(step_path(root, step)).verify()
    return list_steps(root)


def same_run(lines, straight):
    assert trajectory(lines) == trajectory(straight) and growths(lines) == growths(straight)


def test_the_run_and_its_checkpoints_are_the_same(tmp_path, straight):
    config, undisturbed = straight
    lines = train(2, config, f"run.dir={tmp_path}", BESIDE)
    same_run(lines, undisturbed)
    assert sound(tmp_path / "checkpoints") == list(range(1, 11))
    saved = [line["step"] for line in events(lines, "checkpoint")]
    assert saved == [line["step"] for line in events(undisturbed, "checkpoint")]
    for step in (2, 3, 4, 8, 10):
        roots = (tmp_path, config.parent / "run")
        mine, other = (NativeCheckpoint.open(step_path(r / "checkpoints", step)) for r in roots)
        assert mine.run_state == other.run_state and mine.catalog == other.catalog
        for tensor, slot in itertools.product(mine.catalog, mine.slots):
            values = [c.read(tensor.name, slot.name, whole(tensor.shape)) for c in (mine, other)]
            assert torch.equal(*values), (step, tensor.name, slot.name)


def _write_only_on_request(rank, notes):
    """Files of a save are started only after another step has ended, or the run waits for them."""
    from megagrow.engine.engine import Engine
    from megagrow.train.saving import Saver

    # The package has a function of that name.
    saving = sys.modules["megagrow.checkpoint.native.save"]
    news, seen = threading.Condition(), {"steps": 0, "at": 0, "awaited": False}
    write, step, save, wait = saving.write_shard, Engine.train_step, Saver.save, Saver.wait

    def tell(**changes):
        with news:
            seen.update(changes)
            news.notify_all()

    def writing(*args, **named):
        with news:
            overtaken = lambda: seen["steps"] > seen["at"]  # noqa: E731
            assert news.wait_for(lambda: overtaken() or seen["awaited"], 100), "nothing happens"
            with open(notes / str(rank), "a") as stream:
                stream.write("s" if overtaken() else "w")
        return write(*args, **named)

    def stepping(*args, **named):
        result = step(*args, **named)
        tell(steps=seen["steps"] + 1)
        return result

    def submitting(*args, **named):
        tell(at=seen["steps"], awaited=False)
        return save(*args, **named)

    def awaiting(*args):
        tell(awaited=True)
        return wait(*args)

    saving.write_shard, Engine.train_step = writing, stepping
    Saver.save, Saver.wait = submitting, awaiting


def test_steps_go_on_while_files_are_written(tmp_path, straight):
    config, _ = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", BESIDE, "checkpoint.every=2",
               "train.stop_after_steps=7"]  # fmt: skip
    [outcomes] = launch(2, command, hook=(_write_only_on_request, tmp_path))
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    # Of steps 2, 3 (a growth follows), 4, 6 and 7 (the end): only the last has no next step.
    assert sound(tmp_path / "run" / "checkpoints") == [2, 3, 4, 6, 7]
    for rank in range(2):
        reasons = (tmp_path / str(rank)).read_text()
        assert reasons == "ssssw", reasons


def _full_disk(rank, step):
    from megagrow.checkpoint.interface import file_writer

    write = file_writer.write_past_cache

    def refusing(descriptor, data):
        if rank == 1 and f"step_{step:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    file_writer.write_past_cache = refusing


def test_a_failure_is_reported_at_the_next_step(tmp_path, straight):
    """As in the foreground: a warning, and the run continues to the next save."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path}", BESIDE]
    [outcomes] = launch(2, command, hook=(_full_disk, 5))
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    lines = log_of(config, command[2])
    [failure] = events(lines, "save_failed")
    assert failure["step"] in (5, 6)
    for words in ("step_00000005: not saved", "rank 1", "ENOSPC"):
        assert words in failure["why"]
    assert sound(tmp_path / "checkpoints") == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    same_run(lines, undisturbed)


def test_the_last_save_must_succeed(tmp_path, straight):
    config, _ = straight
    command = ["--config", config, f"run.dir={tmp_path}", BESIDE, "train.stop_after_steps=2"]
    [outcomes] = launch(2, command, hook=(_full_disk, 2))
    assert [o.status for o in outcomes] == [1, 1]
    assert "step_00000002: not saved" in outcomes[0].err and "ENOSPC" in outcomes[0].err
    assert sound(tmp_path / "checkpoints") == [1]


MOMENTS = [("write_shard", 1), ("commit", 1), ("commit", 2), ("retire", 1), ("write_run", 3),
           ("train_step", 2), ("_copies", 2), ("wait", 2)]  # fmt: skip


def test_killed_while_a_save_is_under_way(tmp_path, straight):
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path}", BESIDE]
    newest = 0
    for name, count in MOMENTS:
        assert killed_launch(2, command, counts={0: count}, name=name), name
        steps = sound(tmp_path / "checkpoints")
        assert max([0, *steps]) >= newest, name
        newest = max([0, *steps])
    same_run(train(2, config, *command[2:]), undisturbed)
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))
