"""The job's store, on PyTorch's real one, whose host stops answering."""

import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

from megagrow.config import WatchConfig
from megagrow.engine.store import BoundedStore
from megagrow.train.health.watch import STALLED, Watch

SERVER = """
import socket, sys, time, torch.distributed as dist
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                      master_listen_fd=listener.detach())
print(port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server():
    """The process of a store, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def store(port, seconds=0.5):
    client = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return BoundedStore(client, seconds)


def test_a_store_that_answers(server):
    bounded = store(server[1])
    bounded.set("a", "1")
    assert bounded.check(["a"]) and not bounded.check(["b"])
    assert bounded.multi_get(["a", "a"]) == [b"1", b"1"]
    assert bounded.compare_set("b", "", "2") == b"2"
    with pytest.raises(RuntimeError, match=r"(?i)time"):  # PyTorch's own timeout
        bounded.multi_get(["c"])
    assert bounded.gather("g", {"x": 1}, rank=1, world=2) is None
    assert bounded.gather("g", 7, rank=0, world=2) == [7, {"x": 1}]
    bounded.broadcast("h", [1], rank=0)
    assert store(server[1]).broadcast("h", None, rank=1) == [1]


def test_a_store_that_does_not_answer(server):
    """As behind a cable that is cut: PyTorch's own client waits on, whatever its timeout."""
    process, port = server
    bounded = store(port)
    bounded.set("a", "1")
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"did not answer within 0\.5 s"):
        bounded.check(["a"])
    with pytest.raises(OSError, match="does not answer"):
        bounded.check(["a"])
    assert time.monotonic() - begin < 20
    process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 60
    while not bounded._stuck.done() and time.monotonic() < end:
        time.sleep(0.05)
    assert bounded.check(["a"])


def test_a_rank_that_is_cut_off_from_the_store_ends_all_the_same(server, tmp_path, capsys):
    process, port = server
    ended = []
    watch = Watch(
        rank=1, world=2, config=WatchConfig(stall=1.0, slow=60.0), store=store(port),
        log=tmp_path / "logs" / "rank_00001.log", exit=ended.append,
    )  # fmt: skip
    with watch:
        watch.begin("step 1", step=1)
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 60
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
    assert ended[0] == STALLED
    said = capsys.readouterr().err
    assert "error: no progress for" in said and "rank 0 answers no more" in said
    assert "stacks of rank 1" in (tmp_path / "logs" / "rank_00001.log").read_text()
