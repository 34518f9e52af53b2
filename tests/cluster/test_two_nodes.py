"""A real run on two nodes, whose supervisors are two processes of this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, events, log_of, settings, train, trajectory, write_config

PRETRAIN = Path(__file__).parent / "faulty_pretrain.py"
PATIENT = 500  # seconds, for a whole job on a machine with other work
HANG, PAUSE = "1:train_step:2:hang", "0:train_step:4:pause"


@pytest.mark.slow
def test_a_rank_hangs_and_then_a_node_is_lost(dataset, tmp_path):
    """The hung rank is named in bounded time; one rank alone continues what two began."""
    alone = write_config(tmp_path / "alone.yaml", settings(dataset, tmp_path / "alone"))
    expected = [step[3] for step in trajectory(train(1, alone))]
    changes = {"checkpoint": {"every": 1}, "watch": {"stall": 15, "slow": 120}}
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run", **changes))
    notes = tmp_path / "notes"
    notes.mkdir()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, REPOSITORY / "launch" / "supervise.py", "--nnodes", "1:2", "--ranks",
             "1", "--master", f"localhost:{port}", "--backoff", "1", "--grace", "5"]  # fmt: skip
    nodes, said = [], [tmp_path / "said_0", tmp_path / "said_1"]
    environ = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
               "MEGAGROW_SECRET": "0123456789abcdef",
               "MEGAGROW_FAULTS": f"{notes} {HANG} {PAUSE}"}  # fmt: skip
    try:
        for number, log in enumerate(said):
            with log.open("w") as stream:
                command = [*words, "--node-rank", number, PRETRAIN, "--config", config]
                nodes.append(
                    subprocess.Popen(
                        [str(word) for word in command], env={**os.environ, **environ},
                        stdout=stream, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        end = time.monotonic() + PATIENT
        while not (notes / PAUSE.replace(":", "_")).exists():
            texts = "\n".join(log.read_text() for log in said)
            assert nodes[0].poll() is None and time.monotonic() < end, texts
            time.sleep(0.05)
        nodes[1].send_signal(signal.SIGKILL)
        status = nodes[0].wait(PATIENT)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    text = said[0].read_text()
    assert status == 0, text
    assert re.search(r"no progress for \d+ s", text) and "rank 1 on " in text, text
    assert "the supervisor of node " in text or "died without a word" in text
    lines = log_of(config)
    assert [x["world"] for x in lines if x["event"] in ("run_start", "resume")] == [2, 2, 1]
    assert len(events(lines, "growth")) >= 2
    assert [step[3] for step in trajectory(lines)] == pytest.approx(expected, rel=1e-5)
