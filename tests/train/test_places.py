"""Directories that cannot be written, and clocks that jump."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from megagrow.checkpoint import list_steps
from megagrow.report.run import summarize
from tests.jobs import launch, log_of, make_dataset, settings, train, trajectory, write_config

NOBODY = 65534


@pytest.fixture
def open_place():
    """A directory that every user may read; pytest's own are for one user only."""
    path = Path(tempfile.mkdtemp(prefix="megagrow-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def _become_nobody(_):
    # Import before this process loses read access to Python's files.

    import megagrow.train.loop  # noqa: F401

    # A child of root may write anywhere; as an ordinary user's process it may not.
    os.setegid(NOBODY)
    os.seteuid(NOBODY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_run_directory_of_another_user(open_place):
    data = make_dataset(open_place / "data")
    run = open_place / "run"
    run.mkdir(mode=0o755)
    config = write_config(open_place / "run.yaml", settings(data, run))
    [outcomes] = launch(2, ["--config", config], hook=(_become_nobody,))
    assert [o.status for o in outcomes] == [1, 1] and outcomes[1].err == ""
    error = outcomes[0].err
    assert error.count("error: ") == 1 and f"run.dir = {run}" in error
    assert "Permission denied" in error and "set run.dir to" in error
    assert list(run.iterdir()) == []


def test_a_file_system_that_is_mounted_to_be_read_only(tmp_path, dataset):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    try:
        config = write_config(tmp_path / "run.yaml", settings(dataset, disk / "run"))
        train(1, config, "train.stop_after_steps=3")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        [[outcome]] = launch(1, ["--config", config])
        assert outcome.status == 1 and outcome.err.count("error: ") == 1
        assert "Read-only file system" in outcome.err and str(disk / "run") in outcome.err
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert list_steps(disk / "run" / "checkpoints") == [2, 3]
        assert train(1, config)[-1]["event"] == "end"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _jumping_clock(_, log):
    """Back an hour in the middle of the run, by the lines of its log, then forward a day."""
    import time

    real = time.time

    def jumping():
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        return real() + (0 if lines < 3 else -3600 if lines < 8 else 86400)

    time.time = jumping


def test_a_clock_that_jumps(tmp_path, dataset):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "jumps"))
    log = tmp_path / "jumps" / "metrics.jsonl"
    [[outcome]] = launch(1, ["--config", config], hook=(_jumping_clock, log))
    assert outcome.status == 0, outcome.err
    straight = train(1, config, f"run.dir={tmp_path / 'straight'}")
    assert trajectory(log_of(config)) == trajectory(straight)
    times = [line["time"] for line in log_of(config)]
    assert min(times) < times[0] - 3000 and max(times) > times[0] + 80000
    assert 0 <= summarize(log_of(config)).goodput <= 1
    assert (tmp_path / "jumps" / "report.html").exists()
