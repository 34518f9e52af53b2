"""Strangers on the network: what they may not do, and what they cannot exhaust."""

import base64
import contextlib
import json
import os
import pickle
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megagrow.cluster import wire
from megagrow.cluster.hub import Hub
from megagrow.cluster.lifeline import connect

REPOSITORY = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
SECRET = "0123456789abcdef"
PATIENT = 300  # seconds, on a machine with other work


@pytest.fixture
def started():
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def supervise(started, directory, *options, limit=None, steps=9999, **environ):
    words = [sys.executable, HERE / "light_supervise.py", "--backoff", 0.1, "--silence", 20,
             *options, HERE / "light_rank.py", "--dir", directory, "--steps", steps]  # fmt: skip

    def lower():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environ}, preexec_fn=lower,
    )  # fmt: skip
    started.append(process)
    return process


def wait_for(condition, seconds=PATIENT):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def saved(directory):
    path = directory / "saved"
    return int(path.read_text() or 0) if path.exists() else 0


# --- a stranger who takes the supervisor's place ------------------------------------------------


@pytest.mark.parametrize("protocol", ["lines", "sealed"])
def test_a_stranger_cannot_give_orders_to_a_node(started, tmp_path, protocol):
    """A node meets a stranger at the supervisor's port, who orders it to run a program.

    In lines of JSON, as a former version took them, and sealed with a guess.
    """
    touched, evil = tmp_path / "touched", tmp_path / "evil"
    evil.mkdir()
    (evil / "sitecustomize.py").write_text(f"open({str(touched)!r}, 'w')")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENT)
        port = listener.getsockname()[1]
        node = supervise(
            started, tmp_path, "--nnodes", 2, "--node-rank", 1, "--master", f"localhost:{port}",
            "--ranks", 1, "--start", PATIENT, MEGAGROW_SECRET=SECRET, MEGAGROW_TOKEN=SECRET,
        )  # fmt: skip
        connection, _ = listener.accept()
        launch = {"event": "launch", "script": [str(HERE / "light_rank.py")], "port": free_port(),
                  "environ": {"PYTHONPATH": str(evil)}, "master": "127.0.0.1",
                  "mark": "m"}  # fmt: skip
        orders = [{"event": "welcome", "ping": 1, "silence": 30}, launch,
                  {"event": "attempt", "number": 1, "wait": 0, "logs": None}]  # fmt: skip
        guess = wire.Seal(b"guess", "supervisor", b"n" * 2 * wire.NONCE)
        heard = b""
        with connection, contextlib.suppress(OSError):
            if protocol == "sealed":
                connection.sendall(b"n" * wire.NONCE + b"p" * wire.PROOF)
            for order in orders:
                line = json.dumps(order).encode() + b"\n"
                connection.sendall(line if protocol == "lines" else guess.wrap(order))
            connection.settimeout(20)
            while fresh := connection.recv(4096):
                heard += fresh
        # A node that closes with words of ours unread resets the line, and its own may be lost.
        assert len(heard) in (0, wire.NONCE + wire.PROOF) and SECRET.encode() not in heard
        status = node.wait(PATIENT)
    assert status == 1 and "it does not know the job's secret" in node.stderr.read()
    assert not touched.exists() and not (tmp_path / "starts_0").exists()


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_stranger_cannot_place_a_pickle_in_the_rendezvous(started, tmp_path):
    """PyTorch keeps the state of a rendezvous as a pickle; its own store lets anybody write it."""
    touched, port = tmp_path / "touched", free_port()
    process = supervise(
        started, tmp_path, "--nnodes", 2, "--node-rank", 0, "--master", f"localhost:{port}",
        "--ranks", 1, MEGAGROW_SECRET=SECRET,
    )  # fmt: skip
    state = base64.b64encode(pickle.dumps(Payload(touched)))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
            with stranger:
                nonces = stranger.recv(wire.NONCE) + b"m" * wire.NONCE
                stranger.sendall(b"m" * wire.NONCE + wire.proof(b"guess", "peer", nonces))
                seal = wire.Seal(b"guess", "peer", nonces)
                for key in ("rendezvous 1", "torch.rendezvous.megagrow-1"):
                    stranger.sendall(seal.wrap({"ask": "set", "values": {key: state.decode()}}))
                assert len(stranger.recv(4096)) == wire.PROOF  # at random
                assert stranger.recv(4096) == b""
        time.sleep(0.2)
    assert process.poll() is None and not touched.exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 75


def test_what_listens(started, tmp_path):
    """A job of this machine alone listens at the loopback interface alone."""
    process = supervise(started, tmp_path, "--ranks", 2)
    wait_for(lambda: saved(tmp_path) > 0)
    inodes = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A" and inode in inodes:
                addresses.append(local.split(":")[0])
    assert addresses and set(addresses) == {"0100007F"}  # 127.0.0.1, in the kernel's spelling
    process.terminate()
    assert process.wait(PATIENT) == 75


# --- strangers in numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("says", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200_000])
def test_a_flood_does_not_end_a_job(started, tmp_path, says):
    """Three hundred connections, where the supervisor may have 256 files open."""
    port = free_port()
    process = supervise(started, tmp_path, "--ranks", 2, "--port", port, limit=256)
    wait_for(lambda: saved(tmp_path) > 0)
    flood = []
    for _ in range(300):
        with contextlib.suppress(OSError):
            stranger = socket.socket()
            stranger.setblocking(False)
            stranger.connect_ex(("127.0.0.1", port))
            flood.append(stranger)
    end = time.monotonic() + 4
    while time.monotonic() < end:  # a byte now and then, from those that have one to say
        for stranger in flood:
            with contextlib.suppress(OSError):
                stranger.send(says)
        time.sleep(0.2)
    step = saved(tmp_path)
    wait_for(lambda: saved(tmp_path) > step + 5)
    # A signal still reaches all ranks, and they are still heard.
    process.terminate()
    status, (_, err) = process.wait(PATIENT), process.communicate()
    for stranger in flood:
        stranger.close()
    assert status == 75, err
    assert (tmp_path / "stopped_0").exists() and (tmp_path / "stopped_1").exists()
    assert "Traceback" not in err, err


def test_strangers_are_hung_up_on_after_a_while(monkeypatch):
    """Also those who send a byte now and then."""
    monkeypatch.setattr("megagrow.cluster.hub._HELLO_SECONDS", 1.0)
    hub = Hub(SECRET.encode(), address="127.0.0.1")
    strangers = [socket.create_connection(("127.0.0.1", hub.port)) for _ in range(3)]
    begin = time.monotonic()
    while strangers:
        for stranger in list(strangers):
            with contextlib.suppress(BlockingIOError):
                try:
                    stranger.send(b"x")
                    if stranger.recv(4096, socket.MSG_DONTWAIT) == b"":
                        strangers.remove(stranger)
                except ConnectionError:
                    strangers.remove(stranger)
        assert time.monotonic() - begin < 30
        time.sleep(0.1)
    assert time.monotonic() - begin >= 0.9 and hub.events.empty()
    hub.close()


def test_members_who_talk_nonsense_are_disconnected(started, tmp_path):
    """They know the secret, and yet cannot bring the supervisor down."""
    port = free_port()
    process = supervise(
        started, tmp_path, "--nnodes", 1, "--node-rank", 0, "--master", f"localhost:{port}",
        "--ranks", 1, MEGAGROW_SECRET=SECRET,
    )  # fmt: skip
    wait_for(lambda: saved(tmp_path) > 0)
    for hello in ({}, {"event": "start"}, {"event": "node"}, {"event": ["x"]}, {"ask": "nothing"},
                  {"ask": "get"}, {"event": "start", "rank": "x", "world": 1, "attempt": 1},
                  {"ask": "set", "values": 7}, {"event": "beat", "step": 10**400}):  # fmt: skip
        lost = queue.SimpleQueue()
        connect("127.0.0.1", port, secret=SECRET.encode(), hello=hello, seconds=10, who="test",
                on_lost=lost.put).close()  # fmt: skip
    step = saved(tmp_path)
    wait_for(lambda: saved(tmp_path) > step + 5)
    process.terminate()
    assert process.wait(PATIENT) == 75


# --- ranks in numbers ---------------------------------------------------------------------------

RANKS = """
import sys, threading, time
sys.setswitchinterval(0.05)
from megagrow.cluster.lifeline import connect
port, first, count, seconds = map(int, sys.argv[1:])
lines = []
for rank in range(first, first + count):
    hello = {"event": "start", "rank": rank, "world": 1000, "attempt": 1, "host": "h", "pid": rank}
    lines.append(connect("127.0.0.1", port, secret=b"0123456789abcdef", hello=hello, seconds=60,
                         who=f"rank {rank}"))
print("connected", flush=True)
end = time.monotonic() + seconds
step, worst, total, n = 0, 0.0, 0.0, 0
while time.monotonic() < end:
    begin, step = time.monotonic(), step + 1
    for line in lines:
        line.say("beat", step=step, doing="training")
    sample = time.monotonic()
    lines[step % count].ask("get", keys=["nothing"])  # comes after the beats on its own line
    sample = time.monotonic() - sample
    worst, total, n = max(worst, sample), total + sample, n + 1
    time.sleep(max(0.0, begin + 1.0 - time.monotonic()))
print(worst, total / n, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_thousand_ranks(record_property):
    """Every second a beat of each: descriptors, memory, and the time until one is heard."""
    hub = Hub(SECRET.encode(), address="127.0.0.1")
    before = memory(), descriptors()
    heard, steps, stop = {}, {}, threading.Event()

    def hear():
        while not stop.is_set():
            with contextlib.suppress(queue.Empty):
                event = hub.events.get(timeout=0.1)
                assert event.kind == "said", event
                if event.message["event"] == "start":
                    heard[event.peer] = event.message["rank"]
                else:
                    steps[event.peer] = event.message["step"]

    thread = threading.Thread(target=hear)
    thread.start()
    begin = time.monotonic()
    groups = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(hub.port), str(first), "250", "20"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for first in range(0, 1000, 250)
    ]  # fmt: skip
    for group in groups:
        assert group.stdout.readline() == "connected\n"
    connected = time.monotonic() - begin
    used = time.process_time()
    waits = [tuple(map(float, group.stdout.readline().split())) for group in groups]
    used = (time.process_time() - used) / 20
    grown, opened = memory() - before[0], descriptors() - before[1]
    stop.set()
    thread.join()
    assert sorted(heard.values()) == list(range(1000)) and min(steps.values()) >= 5
    assert opened <= 1000 + 20
    assert grown < 200e6
    worst, mean = max(w for w, _ in waits), sum(m for _, m in waits) / len(waits)
    assert worst < 10.0  # a third of --silence, on a machine with other work
    print(f"1,000 ranks: connected in {connected:.1f} s, {opened} descriptors, "
          f"{grown / 1e6:.0f} MB, an answer after the beats of all in {1e3 * mean:.0f} ms "
          f"(at most {1e3 * worst:.0f}), {100 * used:.0f} % of a core")  # fmt: skip
    for group in groups:
        group.kill()
        group.communicate()
    hub.close()


def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def descriptors():
    return len(os.listdir("/proc/self/fd"))
