"""The connection between ranks and supervisor, with real processes as ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megagrow.cluster import lifeline
from megagrow.cluster.lifeline import Lifeline, address_of
from megagrow.cluster.lifeline_server import Exchange
from megagrow.errors import MegagrowError

TOKEN = "secret"


@pytest.fixture
def exchange():
    made = Exchange(token=TOKEN, ping=0.05, silence=2.0)
    yield made
    made.close()


def rank(exchange, body, *, number=3, port=None):
    """A process that has the lifeline in its environment and runs `body`."""
    code = "import os, signal, sys, time\nfrom megagrow.cluster.lifeline import Lifeline, say\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + body],
        env={
            **os.environ,
            "RANK": str(number),
            "WORLD_SIZE": "8",
            lifeline.VARIABLE: f"localhost:{port or exchange.port}:{TOKEN}",
        },
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(exchange, wanted, seconds=60):
    """All events up to the first that `wanted` accepts."""
    events, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        for event in exchange.poll(0.05):
            events.append(event)
            if wanted(event):
                return events
    raise AssertionError(f"waited in vain; there was {events}")


def gone(event):
    return event.kind == "gone"


def said(event):
    return lambda e: e.message.get("event") == event


def words(events):
    return [e.message["event"] for e in events if e.kind == "said"]


def test_a_rank_from_start_to_end(exchange):
    process = rank(
        exchange,
        "line = Lifeline.from_environment(); assert Lifeline.from_environment() is line\n"
        "line.say('beat', step=7, doing='training'); say('saved', step=7); line.say('done')\n",
    )
    events = until(exchange, gone)
    assert words(events) == ["start", "beat", "saved", "done"]
    start, beat = events[0].message, events[1].message
    assert (start["rank"], start["world"], start["pid"]) == (3, 8, process.pid)
    assert start["host"] == socket.gethostname() and "token" not in start
    assert beat == {"event": "beat", "step": 7, "doing": "training"}
    # The line of a finished rank ends without any noise.
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_sigkill_is_seen_at_once(exchange):
    process = rank(exchange, "Lifeline.from_environment(); time.sleep(600)")
    until(exchange, said("start"))
    process.kill()
    assert words(until(exchange, gone)) == []


def test_a_rank_whose_child_lives_on_is_gone_all_the_same(exchange):
    """A forked worker does not hold its parent's connection open."""
    process = rank(
        exchange,
        "line = Lifeline.from_environment()\n"
        "if os.fork() == 0: say('failed'); line.say('failed'); time.sleep(3); os._exit(0)\n"
        "line.say('beat'); time.sleep(600)",
    )
    until(exchange, said("beat"))
    process.kill()
    assert words(until(exchange, gone, seconds=2)) == []


def test_the_supervisor_is_gone(exchange):
    process = rank(exchange, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(exchange, said("beat"))
    exchange.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == "rank 3: the supervisor is gone; this rank ends\n"


def test_the_supervisor_is_gone_after_the_last_word(exchange):
    """A rank that has said done ends normally, with its own status."""
    process = rank(
        exchange,
        "Lifeline.from_environment().say('done')\nsys.stdin.read(); time.sleep(0.3); sys.exit(5)",
    )
    until(exchange, said("done"))
    exchange.close()
    process.stdin.close()
    assert process.wait(60) == 5 and process.stderr.read() == ""


def test_a_supervisor_that_is_cut_off(exchange):
    """No end of the connection, only silence, as with a pulled cable."""
    process = rank(exchange, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(exchange, said("beat"))
    assert process.wait(60) == 1  # nobody polls: nothing is sent any more
    assert "nothing was heard from the supervisor for" in process.stderr.read()


def test_a_rank_that_is_cut_off(exchange):
    process = rank(exchange, "Lifeline.from_environment(); time.sleep(600)")
    [start] = until(exchange, said("start"))
    start.peer.patience = 0.5
    process.send_signal(signal.SIGSTOP)
    assert until(exchange, lambda e: e.kind == "silent")[-1].message["seconds"] > 0.5
    # A connection that moves again is no longer silent.
    process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 60
    while start.peer.silent and time.monotonic() < end:
        exchange.poll(0.05)
    assert not start.peer.silent and start.peer.open
    process.kill()


def test_a_supervisor_that_stood_still_blames_nobody(exchange):
    process = rank(exchange, "Lifeline.from_environment(); time.sleep(600)")
    [start] = until(exchange, said("start"))
    start.peer.patience = 0.5
    exchange._polled -= 100
    start.peer.heard -= 100
    assert [e for e in exchange.poll(0.0) if e.kind == "silent"] == []
    process.kill()


def test_a_signal_is_passed_on(exchange):
    process = rank(
        exchange,
        "signal.signal(signal.SIGUSR1, lambda n, f: sys.exit(n))\n"
        "Lifeline.from_environment().say('beat'); time.sleep(600)",
    )
    until(exchange, said("beat"))
    exchange.tell_all("stop", signal=int(signal.SIGUSR1))
    assert process.wait(60) == signal.SIGUSR1


def test_a_signal_before_anybody_handles_it(exchange):
    """Nothing is trained yet, so the job can simply be started again."""
    process = rank(exchange, "Lifeline.from_environment().say('beat'); time.sleep(600)")
    until(exchange, said("beat"))
    exchange.tell_all("stop", signal=int(signal.SIGTERM))
    assert words(until(exchange, gone)) == ["stopped"]
    assert process.wait(60) == lifeline.STATUS_STOPPED


def test_the_job_is_ended_with_a_reason(exchange):
    """Even if the main thread hangs and no Python signal handler would ever run."""
    process = rank(
        exchange,
        "import ctypes; Lifeline.from_environment().say('beat'); ctypes.CDLL(None).sleep(600)",
    )
    until(exchange, said("beat"))
    exchange.tell_all("end", reason="rank 2 on h1 died")
    assert process.wait(60) == 1
    assert process.stderr.read() == "rank 3: rank 2 on h1 died; this rank ends\n"


def test_strangers_are_hung_up_on(exchange):
    for first in (b'{"token": "wrong"}\n', b"GET / HTTP/1.1\n", b"[]\n", b"\xff\n", b'{"a":1}\n',
                  b"x" * 200_000, b"[" * 60_000 + b"\n"):  # fmt: skip
        with socket.create_connection(("localhost", exchange.port)) as stranger:
            stranger.sendall(first)
            stranger.settimeout(0.05)
            end = time.monotonic() + 60
            while not hung_up(stranger):
                assert exchange.poll(0.05) == [] and time.monotonic() < end
            assert exchange.peers == []


def hung_up(stranger):
    try:
        return stranger.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_many_lines_at_once(exchange):
    """Enough to reveal anything quadratic or limited to 1024 files."""
    lines = []
    for number in range(1500):
        line = socket.create_connection(("localhost", exchange.port))
        hello = {"token": TOKEN, "event": "start", "rank": number}
        line.sendall(json.dumps(hello).encode() + b"\n")
        lines.append(line)
        if number % 100 == 99:
            exchange.poll(0.0)
    seen = set()
    end = time.monotonic() + 60
    while len(seen) < len(lines) and time.monotonic() < end:
        seen |= {e.message["rank"] for e in exchange.poll(0.05)}
        seen |= {p.hello["rank"] for p in exchange.peers if p.hello}
    assert seen == set(range(len(lines)))
    exchange.tell_all("end", reason="enough")
    for line in (lines[0], lines[-1]):
        line.settimeout(60)
        got = b""
        while b"enough" not in got:
            got += line.recv(4096)
    for line in lines:
        line.close()


def test_no_supervisor(monkeypatch):
    monkeypatch.delenv(lifeline.VARIABLE, raising=False)
    assert Lifeline.from_environment() is None
    lifeline.say("beat", step=1)


def test_nobody_is_at_that_address(monkeypatch):
    monkeypatch.setattr(lifeline, "_CONNECT_SECONDS", 0.1)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(lifeline.VARIABLE, f"localhost:{port}:{TOKEN}")
    with pytest.raises(MegagrowError, match=f"localhost:{port}: Connection refused"):
        Lifeline.from_environment()


@pytest.mark.parametrize("text", ["", "host", "host:1", "host:x:t", ":1:t", "h:99999:t", "h:1:"])
def test_addresses_that_are_none(text):
    with pytest.raises(MegagrowError, match="host:port:token") as error:
        address_of(text)
    assert text == "" or f"found:    {text}" not in str(error.value)  # it holds a secret


def test_addresses():
    assert address_of("h0:80:t") == ("h0", 80, "t")
    assert address_of("fd00::2:80:t") == address_of("[fd00::2]:80:t") == ("fd00::2", 80, "t")


def test_saying_never_raises(exchange):
    """Not for what JSON cannot express, nor on a connection that is never read."""
    connection = socket.create_connection(("localhost", exchange.port))
    line = Lifeline(connection, {"token": TOKEN}, on_lost=lambda reason: None)
    line.say("beat", what=object())
    begin = time.monotonic()
    for _ in range(3000):
        line.say("beat", text="x" * 16_000)
    line.close()
    line.say("beat")
    assert time.monotonic() - begin < 60
