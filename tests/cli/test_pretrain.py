"""The real command under the real launchers, as a user runs it."""

import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import (
    PRETRAIN,
    REPOSITORY,
    events,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)

BIN = Path(sys.executable).parent


def start(launcher, *arguments):
    """A job, started from the repository's root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = {
        "python": [sys.executable],
        "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": [
            BIN / "deepspeed", "--hostfile", "none", "--num_gpus", "2", "--master_port", port,
        ],
    }  # fmt: skip
    token = secrets.token_hex(8)
    job = subprocess.Popen(
        [str(part) for part in (*commands[launcher], PRETRAIN, *arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JOB": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its process group is what a terminal sends Ctrl-C to
    )
    job.token = token
    return job


def finish(job, timeout=240):
    """(exit status, output)."""
    try:
        said, _ = job.communicate(timeout=timeout)
    finally:
        stop(job)
    return job.returncode, said


def ranks_of(job):
    """The job's training processes, by rank; launchers put them into their own sessions.

    They inherit the launcher's environment, whose JOB identifies the job.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            items = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        environment = dict(item.split(b"=", 1) for item in items if b"=" in item)
        if environment.get(b"JOB") == job.token.encode() and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(entry.name)
    return found


def stop(job):
    """SIGKILL the launcher and every rank."""
    for pid in (job.pid, *ranks_of(job).values()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    job.wait()
    while ranks_of(job):
        time.sleep(0.01)


def wait_for_step(job, config, step):
    """Wait until the log has a step."""
    path = log_path(config)
    while job.poll() is None:
        text = path.read_text() if path.exists() else ""
        if f'"event": "step", "step": {step},' in text:
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}:\n{job.stdout.read()}")


def log_path(config):
    return config.parent / "run" / "metrics.jsonl"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dataset):
    base = tmp_path_factory.mktemp("undisturbed")
    mapping = settings(dataset, base / "run", checkpoint={"every": 1})
    return train(2, write_config(base / "run.yaml", mapping))


@pytest.fixture
def config(tmp_path, dataset):
    mapping = settings(dataset, tmp_path / "run", checkpoint={"every": 1})
    return write_config(tmp_path / "run.yaml", mapping)


def test_killed_under_torchrun_and_resumed_under_deepspeed(config, undisturbed):
    """All of it dies while training the second stage; the losses equal an undisturbed run's."""
    job = start("torchrun", "--config", config)
    wait_for_step(job, config, 5)
    stop(job)
    assert len(events(log_of(config), "end")) == 0
    status, said = finish(start("deepspeed", "--config", config, "--resume", "auto"))
    assert status == 0, said
    lines = log_of(config)
    assert len(events(lines, "resume")) == 1 and lines[-1]["event"] == "end"
    assert trajectory(lines) == trajectory(undisturbed)
    assert said.count("resuming from") == 1 and said.count("report: ") == 1
    assert "FutureWarning" not in said and "Traceback" not in said


def test_plain_python_is_a_job_of_one_process(config, undisturbed):
    status, said = finish(start("python", "--config", config, "train.stop_after_steps=4"))
    assert status == 0, said
    lines = log_of(config)
    assert lines[0]["world"] == 1 and [x["step"] for x in events(lines, "step")] == [1, 2, 3, 4]
    expected = [line["loss"] for line in events(undisturbed, "step")][:4]
    assert [line["loss"] for line in events(lines, "step")] == pytest.approx(expected, rel=1e-5)
    assert "Traceback" not in said and "FutureWarning" not in said


def test_a_wrong_setting_under_the_launcher(config):
    """Reported once, and the launcher's own status is not 0."""
    status, said = finish(start("deepspeed", "--config", config, "optimizer.lrr=1"))
    # A rank that waits two seconds for rank 0 in vain, on a busy machine, may add "rank 1: error:".
    assert status != 0 and len(re.findall("^error: ", said, re.MULTILINE)) == 1
    assert "optimizer.lrr" in said
    assert not log_path(config).exists()


def test_one_rank_dies(config):
    """The others end too, with a line instead of a traceback, and the run can be resumed."""
    job = start("torchrun", "--config", config, "stages.2.until.steps=900")
    wait_for_step(job, config, 4)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    status, said = finish(job)
    assert status != 0
    assert f'File "{REPOSITORY / "megagrow"}' not in said, said
    assert "lost contact with another rank" in said or "Sending process" in said
    assert train(2, config)[-1]["event"] == "end"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_ctrl_c_under_a_launcher_saves_the_run_and_it_goes_on_from_there(
    config, undisturbed, launcher
):
    """The launchers end in their own way; the ranks finish their step and save."""
    job = start(launcher, "--config", config, "checkpoint.every=900")
    wait_for_step(job, config, 4)
    os.killpg(job.pid, signal.SIGINT)
    said, _ = job.communicate(timeout=240)  # until the last rank has closed its output
    stop(job)
    assert "stopped by SIGINT at step" in said and "no checkpoint" not in said, said
    assert f'File "{REPOSITORY / "megagrow"}' not in said, said
    assert log_of(config)[-1]["reason"] == "SIGINT"
    lines = train(2, config)
    assert [x["step"] for x in events(lines, "step")] == list(range(1, 11))
    if launcher != "python":
        assert trajectory(lines) == trajectory(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_times(config, undisturbed, seed):
    """Real jobs, killed at a random time after a random step, until one finishes."""
    rng = random.Random(seed)
    for _ in range(4):
        job = start(rng.choice(["torchrun", "deepspeed"]), "--config", config)
        done = len(events(log_of(config), "step")) if log_path(config).exists() else 0
        if done >= 9:
            stop(job)
            break
        wait_for_step(job, config, rng.randint(done + 1, min(done + 3, 9)))
        time.sleep(rng.random())
        stop(job)
    status, said = finish(start("deepspeed", "--config", config))
    assert status == 0, said
    assert trajectory(log_of(config)) == trajectory(undisturbed)
