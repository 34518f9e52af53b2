"""The connection between ranks and supervisor, with real processes as ranks."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import time

import pytest

from megagrow.cluster import lifeline, wire
from megagrow.cluster.hub import Hub
from megagrow.cluster.lifeline import Lifeline, address_of, connect
from megagrow.errors import ConfigError, MegagrowError

SECRET = b"0123456789abcdef"


@pytest.fixture
def hub():
    made = Hub(SECRET, address="127.0.0.1", ping=0.1, silence=2.0)
    yield made
    made.close()


def rank(hub, body, *, number=3, secret=SECRET):
    """A process that has the lifeline in its environment and runs `body`."""
    code = "import os, signal, sys, time\nfrom megagrow.cluster.lifeline import Lifeline, say\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + body],
        env={
            **os.environ,
            "RANK": str(number),
            "WORLD_SIZE": "8",
            lifeline.VARIABLE: f"127.0.0.1:{hub.port}",
            wire.SECRET: secret.decode(),
        },
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(hub, wanted, seconds=60):
    """All events up to the first that `wanted` accepts."""
    events, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            events.append(hub.events.get(timeout=0.05))
            if wanted(events[-1]):
                return events
    raise AssertionError(f"waited in vain; there was {events}")


def gone(event):
    return event.kind == "gone"


def said(event):
    return lambda e: e.message.get("event") == event


def words(events):
    return [e.message["event"] for e in events if e.kind == "said"]


def test_a_rank_from_start_to_end(hub):
    process = rank(
        hub,
        "line = Lifeline.from_environment(); assert Lifeline.from_environment() is line\n"
        "line.say('beat', step=7, doing='training'); say('saved', step=7); line.say('done')\n",
    )
    events = until(hub, gone)
    assert words(events) == ["start", "beat", "saved", "done"]
    start, beat = events[0].message, events[1].message
    assert (start["rank"], start["world"], start["pid"]) == (3, 8, process.pid)
    assert start["host"] == socket.gethostname() and start["attempt"] == 1
    assert beat == {"event": "beat", "step": 7, "doing": "training"}
    # The line of a finished rank ends without any noise.
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_sigkill_is_seen_at_once(hub):
    process = rank(hub, "Lifeline.from_environment(); time.sleep(600)")
    until(hub, said("start"))
    process.kill()
    assert words(until(hub, gone)) == []


def test_a_rank_whose_child_lives_on_is_gone_all_the_same(hub):
    """A forked worker does not hold its parent's connection open."""
    process = rank(
        hub,
        "line = Lifeline.from_environment()\n"
        "if os.fork() == 0: say('failed'); line.say('failed'); time.sleep(3); os._exit(0)\n"
        "line.say('beat'); time.sleep(600)",
    )
    until(hub, said("beat"))
    process.kill()
    assert words(until(hub, gone, seconds=2)) == []


def test_the_supervisor_is_gone(hub):
    process = rank(hub, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(hub, said("beat"))
    hub.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == "rank 3: the supervisor is gone; this rank ends\n"


def test_the_supervisor_is_gone_after_the_last_word(hub):
    """A rank that has said done ends normally, with its own status."""
    process = rank(
        hub,
        "Lifeline.from_environment().say('done')\nsys.stdin.read(); time.sleep(0.3); sys.exit(5)",
    )
    until(hub, said("done"))
    hub.close()
    process.stdin.close()
    assert process.wait(60) == 5 and process.stderr.read() == ""


def test_a_supervisor_that_is_cut_off(hub):
    """No end of the connection, only silence, as with a pulled cable."""
    process = rank(hub, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(hub, said("beat"))
    hub._call(time.sleep, 8)  # nothing is sent any more
    assert process.wait(60) == 1
    assert "nothing was heard from the supervisor for" in process.stderr.read()


def test_a_rank_that_is_cut_off(hub):
    process = rank(hub, "Lifeline.from_environment(); time.sleep(600)")
    [start] = until(hub, said("start"))
    start.peer.patience = 0.5
    process.send_signal(signal.SIGSTOP)
    assert until(hub, lambda e: e.kind == "silent")[-1].message["seconds"] > 0.5
    # A connection that moves again is no longer silent.
    process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 60
    while start.peer.silent and time.monotonic() < end:
        time.sleep(0.05)
    assert not start.peer.silent and start.peer in hub.peers
    process.kill()


def test_a_supervisor_that_stood_still_blames_nobody():
    hub = Hub(SECRET, address="127.0.0.1", ping=0.1, silence=60.0, patience=3.0)
    process = rank(hub, "Lifeline.from_environment(); time.sleep(600)")
    [start] = until(hub, said("start"))
    hub._call(time.sleep, 6)
    time.sleep(8)
    assert hub.events.empty() and not start.peer.silent and start.peer in hub.peers
    process.kill()
    until(hub, gone)
    hub.close()


def test_a_signal_is_passed_on(hub):
    process = rank(
        hub,
        "signal.signal(signal.SIGUSR1, lambda n, f: sys.exit(n))\n"
        "Lifeline.from_environment().say('beat'); time.sleep(600)",
    )
    until(hub, said("beat"))
    hub.tell_all("stop", signal=int(signal.SIGUSR1))
    assert process.wait(60) == signal.SIGUSR1


def test_a_signal_before_anybody_handles_it(hub):
    """Nothing is trained yet, so the job can simply be started again."""
    process = rank(hub, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(hub, said("beat"))
    hub.tell_all("stop", signal=int(signal.SIGTERM))
    assert words(until(hub, gone)) == ["stopped"]
    assert process.wait(60) == lifeline.STATUS_STOPPED


def test_the_job_is_ended_with_a_reason(hub):
    """Even if the main thread hangs and no Python signal handler would ever run."""
    process = rank(
        hub,
        "import ctypes; Lifeline.from_environment().say('beat'); ctypes.CDLL(None).sleep(600)",
    )
    until(hub, said("beat"))
    hub.tell_all("end", reason="rank 2 on h1 died")
    assert process.wait(60) == 1
    assert process.stderr.read() == "rank 3: rank 2 on h1 died; this rank ends\n"


def test_a_rank_with_another_secret(hub):
    process = rank(hub, "Lifeline.from_environment()", secret=b"fedcba9876543210")
    assert process.wait(60) == 1
    assert "it does not know the job's secret" in process.stderr.read()
    assert hub.events.empty()


def test_a_supervisor_with_another_secret():
    """Nothing is said to it: it learns a proof, which is worth nothing elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = rank(type("Hub", (), {"port": port}), "Lifeline.from_environment()")
        stranger, _ = listener.accept()
        with stranger:
            stranger.sendall(b"n" * wire.NONCE)
            first = b""
            while len(first) < wire.NONCE + wire.PROOF:
                first += stranger.recv(1 << 16)
            stranger.sendall(b"p" * wire.PROOF)
            assert process.wait(60) == 1
            assert stranger.recv(1 << 16) == b"" and len(first) == wire.NONCE + wire.PROOF
            assert SECRET not in first
    assert "it does not know the job's secret" in process.stderr.read()


def test_messages_cannot_be_changed_repeated_or_reordered():
    nonces = b"n" * 64
    sender = wire.Seal(SECRET, "peer", nonces)
    first, second = sender.wrap({"event": "beat"}), sender.wrap({"event": "done"})
    for bad in (first + first, second, first[:-1] + b"]", b"\x7f" + first[1:]):
        with pytest.raises(ValueError, match=r"seal|bytes"):
            list(wire.Splitter(wire.Seal(SECRET, "peer", nonces)).feed(bad))
    for key, side, other in ((b"x" * 16, "peer", nonces), (SECRET, "supervisor", nonces),
                             (SECRET, "peer", b"m" * 64)):  # fmt: skip
        with pytest.raises(ValueError, match="seal"):
            list(wire.Splitter(wire.Seal(key, side, other)).feed(first))
    whole = wire.Splitter(wire.Seal(SECRET, "peer", nonces))
    parts = [m for i in range(len(first + second)) for m in whole.feed((first + second)[i : i + 1])]
    assert [m["event"] for m in parts] == ["beat", "done"]


def test_the_store(hub):
    lost = []
    line = connect("127.0.0.1", hub.port, secret=SECRET, hello={}, seconds=10, who="test",
                   on_lost=lost.append)  # fmt: skip
    assert line.ask("get", keys=["a"])["values"] == [None]
    assert line.ask("swap", key="a", expected="x", value="1") | {"event": "", "number": 0} == {
        "event": "", "number": 0, "value": None, "swapped": False,
    }  # fmt: skip
    assert line.ask("swap", key="a", expected=None, value="1" * 100_000)["swapped"]
    line.ask("set", values={"b": "2"})
    assert line.ask("get", keys=["a", "b"])["values"] == ["1" * 100_000, "2"]
    hub.close()
    with pytest.raises(OSError, match=r"does not answer|Broken pipe|closed|descriptor"):
        line.ask("get", keys=["a"])


@pytest.mark.parametrize(("environ", "error"), [
    ({wire.SECRET: "short"}, "too short"),
    ({wire.SECRET_FILE: "/no/such/file"}, "cannot be read"),
    ({wire.SECRET_FILE: "readable"}, "other users may read it"),
])  # fmt: skip
def test_secrets_that_are_none(environ, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readable").write_text("0123456789abcdef")
    (tmp_path / "readable").chmod(0o644)
    with pytest.raises(ConfigError, match=error):
        wire.secret_of(environ)
    assert wire.secret_of({}) is None


def test_a_secret_in_a_file_for_each_host(tmp_path):
    path = tmp_path / socket.gethostname()
    path.write_text(SECRET.decode() + "\n")
    path.chmod(0o600)
    assert wire.secret_of({wire.SECRET_FILE: str(tmp_path)}) == SECRET
    assert wire.secret_of({wire.SECRET_FILE: str(path)}) == SECRET


def test_no_supervisor(monkeypatch):
    monkeypatch.delenv(lifeline.VARIABLE, raising=False)
    assert Lifeline.from_environment() is None
    lifeline.say("beat", step=1)


def test_nobody_is_at_that_address(monkeypatch):
    monkeypatch.setattr(lifeline, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(lifeline, "_current", None)
    monkeypatch.setenv(wire.SECRET, SECRET.decode())
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(lifeline.VARIABLE, f"localhost:{port}")
    with pytest.raises(MegagrowError, match=f"localhost:{port}: Connection refused"):
        Lifeline.from_environment()
    monkeypatch.delenv(wire.SECRET)
    with pytest.raises(ConfigError, match="the job's secret is not"):
        Lifeline.from_environment()


@pytest.mark.parametrize("text", ["", "host", "host:x", ":1", "h:99999", "h:"])
def test_addresses_that_are_none(text):
    with pytest.raises(MegagrowError, match="host:port"):
        address_of(text)


def test_addresses():
    assert address_of("h0:80") == ("h0", 80)
    assert address_of("fd00::2:80") == address_of("[fd00::2]:80") == ("fd00::2", 80)


def test_saying_never_raises(hub):
    """Not for what JSON cannot express, nor on a connection that is never read."""
    lost = []
    line = connect("127.0.0.1", hub.port, secret=SECRET, hello={}, seconds=10, who="test",
                   on_lost=lost.append)  # fmt: skip
    line.say("beat", what=object())
    until(hub, lambda e: "what" in e.message)
    hub._call(time.sleep, 5)
    begin = time.monotonic()
    for _ in range(3000):
        line.say("beat", text="x" * 16_000)
    line.close()
    line.say("beat")
    assert time.monotonic() - begin < 60
