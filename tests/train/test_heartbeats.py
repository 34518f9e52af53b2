"""Heartbeats to NVIDIA's resiliency extension: a rank that hangs is ended and the job resumes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megagrow.train.health import heartbeats
from tests.jobs import REPOSITORY, events, log_of, settings, train, trajectory, write_config

installed = pytest.mark.skipif(
    find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed"
)
FAULTY = Path(__file__).parents[1] / "cluster" / "faulty_pretrain.py"
HANG = "0:train_step:5:hang"


@installed
def test_a_rank_that_hangs_is_ended_by_ft_launcher_and_resumes(tmp_path, dataset):
    """The watch inside the job is patient here: nobody else would end it."""
    mapping = settings(dataset, tmp_path / "run", watch={"stall": 500, "slow": 500})
    config = write_config(tmp_path / "run.yaml", {**mapping, "stages": [{"until": {"steps": 8}}]})
    undisturbed = train(1, config, f"run.dir={tmp_path / 'alone'}")
    notes = tmp_path / "notes"
    notes.mkdir()
    launcher = [sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
    options = {
        "nnodes": 1, "nproc-per-node": 1, "rdzv-backend": "c10d", "rdzv-endpoint": "localhost:0",
        "max-restarts": 1, "ft-initial-rank-heartbeat-timeout": 400,
        "ft-rank-heartbeat-timeout": 20, "ft-workload-check-interval": 1,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [*launcher, *words, "--ignore-missing-fault-tol-cfg", FAULTY, "--config", config],
        env={
            **os.environ,
            "MEGAGROW_FAULTS": f"{notes} {HANG}",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [note.name for note in notes.iterdir()] == [HANG.replace(":", "_")]
    lines = log_of(config)
    assert len(events(lines, "resume")) == 1 and trajectory(lines) == trajectory(undisturbed)
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert log.count("heartbeats go to the monitor of ft_launcher") == 2


class Client:
    """Stands in for a `RankMonitorClient` whose monitor dies."""

    def __init__(self):
        self.sent = 0

    def send_heartbeat(self):
        self.sent += 1
        if self.sent == 2:
            raise RuntimeError("Broken pipe")


def test_a_monitor_that_dies_is_told_once_and_training_goes_on(monkeypatch):
    client, said = Client(), []
    beats = heartbeats.Heartbeats(client, said.append)
    beats.send()
    beats.send()
    assert client.sent == 1  # no more than one a second
    monkeypatch.setattr(heartbeats, "_LEAST_SECONDS", 0.0)
    beats = heartbeats.Heartbeats(client, said.append)
    for _ in range(3):
        beats.send()
    assert client.sent == 2 and len(said) == 1 and "Broken pipe" in said[0]


def test_without_ft_launcher_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(heartbeats.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", None)
    said = []
    with heartbeats.heartbeats(said.append) as beats:
        beats.send()
    assert said == []
    monkeypatch.setenv(heartbeats.VARIABLE, "/nonexistent")
    with heartbeats.heartbeats(said.append) as beats:
        beats.send()
    assert len(said) == 1 and "warning: no heartbeats" in said[0]
