"""Copies in the memory of hosts: a run goes on from them as if undisturbed, without the disk."""

import os
import shutil
import uuid
from pathlib import Path

import pytest

from megagrow.checkpoint import list_steps, step_path
from tests.jobs import (
    events,
    growths,
    kill_at_call,
    launch,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")

EVERY = "checkpoint.memory_every=1"
RARE = "checkpoint.every=100"


@pytest.fixture(scope="module", name="straight")
def without_copies(tmp_path_factory, dataset):
    """An undisturbed run of two ranks: (its configuration, its log)."""
    base = tmp_path_factory.mktemp("straight")
    config = write_config(base / "run.yaml", settings(dataset, base / "run"))
    return config, train(2, config)


@pytest.fixture
def memory():
    """A directory for hosts in memory, which are empty again at the end."""
    path = Path("/dev/shm") / f"test-{uuid.uuid4().hex}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def on_hosts(rank, memory, ranks, counts, name):
    """`ranks` of them on each host; some are killed at a call of a function."""
    os.environ["MEGAGROW_MEMORY"] = str(host(memory, rank // ranks))
    kill_at_call(rank, counts, name)


def host(memory, number):
    path = memory / f"host_{number}"
    path.mkdir(exist_ok=True)
    return path


def attempt(world, command, memory, *, ranks=1, kill=None, name="train_step"):
    """The outcomes by rank; None if one was to be killed, as `kill` (counts by rank) says."""
    hook = (on_hosts, memory, ranks, kill or {}, name)
    if kill:
        with pytest.raises(AssertionError, match=r"rank \d+ failed:\nthe process ended without"):
            launch(world, command, hook=hook)
        return None
    [outcomes] = launch(world, command, hook=hook)
    assert [o.status for o in outcomes] == [0] * world, outcomes[0].err
    return outcomes


def same_run(lines, straight):
    assert trajectory(lines) == trajectory(straight) and growths(lines) == growths(straight)


def copies(memory, number):
    """The names of the files that a host holds, by step."""
    [root] = host(memory, number).iterdir()
    return {step: sorted(p.name for p in step_path(root, step).iterdir())
            for step in list_steps(root)}  # fmt: skip


@pytest.mark.parametrize("lost", [None, pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_or_a_host_is_lost(tmp_path, straight, memory, lost):
    """Nothing was saved on disk: all that the second job has is in memory."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY, RARE]
    assert attempt(2, command, memory, kill={1: 6}) is None
    assert list_steps(tmp_path / "run" / "checkpoints") == [3]  # before the growth
    for number in range(2):
        assert copies(memory, number) == {
            5: ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
        }
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    if lost is not None:
        shutil.rmtree(host(memory, lost))
    outcomes = attempt(2, command, memory)
    assert "(step 5)" in outcomes[0].err
    lines = log_of(config, f"run.dir={tmp_path / 'run'}")
    same_run(lines, undisturbed)
    [resume] = events(lines, "resume")
    assert resume["memory"] and resume["step"] == 5
    assert not any(list(host(memory, n).iterdir()) for n in range(2))  # the run has ended


@pytest.mark.parametrize(
    "counts",
    [pytest.param({0: 2}, marks=pytest.mark.slow), pytest.param({1: 2}, marks=pytest.mark.slow),
     {0: 3, 1: 3}],
)  # fmt: skip
def test_killed_while_a_copy_is_made(tmp_path, straight, memory, counts):
    """Some hosts have the new copy, others the old one: a start takes one that is whole."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY, RARE]
    assert attempt(2, command, memory, kill=counts, name="_commit") is None
    attempt(2, command, memory)
    lines = log_of(config, f"run.dir={tmp_path / 'run'}")
    same_run(lines, undisturbed)
    [resume] = events(lines, "resume")
    assert resume["memory"] and resume["step"] in (max(counts.values()) - 1, max(counts.values()))


def test_another_layout_reads_files_of_other_hosts(tmp_path, straight, memory):
    """Four ranks on two hosts, of which one is lost; two go on, on one host each."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY, RARE]
    assert attempt(4, [*command, "layout.tensor=2"], memory, ranks=2, kill={3: 6}) is None
    shutil.rmtree(host(memory, 0))
    outcomes = attempt(2, command, memory)
    lines = log_of(config, f"run.dir={tmp_path / 'run'}")
    assert "(step 5)" in outcomes[0].err and events(lines, "resume")[0]["memory"]
    ours, theirs = ([step["loss"] for step in events(x, "step")] for x in (lines, undisturbed))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_damaged_copy(tmp_path, straight, memory, both):
    """Its checksum tells; the run goes on from the disk, which is said."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY, "checkpoint.every=2"]
    assert attempt(2, command, memory, kill={0: 6}) is None
    shutil.rmtree(host(memory, 1))  # so that it is fetched from this one
    [root] = host(memory, 0).iterdir()
    for name in ["rank_00001.safetensors"] + ["rank_00000.safetensors"] * both:
        path = step_path(root, 5) / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    outcomes = attempt(2, command, memory)
    assert "CRC-32" in outcomes[0].err and "What run.dir holds is tried" in outcomes[0].err
    lines = log_of(config, f"run.dir={tmp_path / 'run'}")
    same_run(lines, undisturbed)
    [resume] = events(lines, "resume")
    assert "memory" not in resume and resume["step"] == 4


def test_copies_that_are_not_to_be_used(tmp_path, straight, memory):
    """The run goes back, or is without copies: what is in memory is deleted."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", "checkpoint.every=2"]
    assert attempt(2, [*command, EVERY], memory, kill={0: 6}) is None
    assert copies(memory, 0).keys() == {5}
    back = ["--resume", step_path(tmp_path / "run" / "checkpoints", 2)]
    assert attempt(2, [*command, EVERY, *back], memory, kill={1: 1}) is None
    assert copies(memory, 0) == copies(memory, 1) == {}
    outcomes = attempt(2, command, memory)
    assert not list(host(memory, 0).iterdir()) and "(step 2)" in outcomes[0].err
    same_run(log_of(config, f"run.dir={tmp_path / 'run'}"), undisturbed)


def test_memory_that_cannot_be_used(tmp_path, straight, monkeypatch):
    config, _ = straight
    [outcomes] = launch(
        1, ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY],
        hook=(on_a_disk, str(tmp_path)),
    )  # fmt: skip
    assert outcomes[0].status == 1
    assert "not a file system in memory" in outcomes[0].err and "MEGAGROW_MEMORY" in outcomes[0].err


def on_a_disk(rank, path):
    os.environ["MEGAGROW_MEMORY"] = path


def test_too_little_memory(tmp_path, straight, memory):
    """The run goes on without a copy."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", "checkpoint.memory_every=4"]
    [outcomes] = launch(2, command, hook=(with_little, memory))
    assert [o.status for o in outcomes] == [0, 0]
    assert "too little memory for a copy of the state" in outcomes[0].err
    lines = log_of(config, f"run.dir={tmp_path / 'run'}")
    same_run(lines, undisturbed)
    assert events(lines, "memory_copy_failed") and not events(lines, "memory_copy")


def with_little(rank, memory):
    from megagrow.checkpoint.native import memory as module

    os.environ["MEGAGROW_MEMORY"] = str(memory)
    module.free_bytes = lambda path: 1000.0 if rank == 0 else float("inf")


def test_what_a_killed_copy_left_is_deleted(tmp_path, straight, memory):
    """It is newer than the whole one, and on one host alone."""
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", EVERY, RARE]
    assert attempt(2, command, memory, kill={0: 6}) is None
    [root] = host(memory, 1).iterdir()
    shutil.copytree(step_path(root, 5), step_path(root, 6))
    outcomes = attempt(2, [*command, "train.stop_after_steps=6"], memory, kill={1: 1})
    assert outcomes is None and copies(memory, 1).keys() == {5}
    attempt(2, command, memory)
    same_run(log_of(config, f"run.dir={tmp_path / 'run'}"), undisturbed)
