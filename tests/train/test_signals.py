"""The effect of signals on a process, whatever its main thread is doing."""

import signal
import subprocess
import sys
import time

import pytest

from megagrow.train.health.signals import agreed, exit_status

# A call into C that never returns, like a collective whose peer is stopped: Python's handlers
# no longer run.
DEADLOCK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from megagrow.train.health import signals
from megagrow.train.health.signals import StopRequest, StoppedWhileStarting, exit_status

def hang():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def ready():
    print("ready", flush=True)

signals._UNWIND = 0.1
"""


def started(body):
    """Start a process that runs `body`, and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEADLOCK + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    """(exit status, output)."""
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


def press(process, times, *, apart=0.7):
    for number in range(times):
        time.sleep(apart if number else 0.0)
        process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ("Path('run/step_00000040')", "its last checkpoint is run/step_00000040"),
        ("None", "it has no checkpoint, so the next start begins at step 0"),
    ],
)
def test_the_second_ctrl_c_ends_a_run_at_once_whatever_it_hangs_in(saved, said):
    process = started(f"""
with StopRequest().listening() as stop:
    stop.deferring, stop.last_saved = True, {saved}
    ready()
    hang()
""")
    press(process, 2)
    status, text = ended(process)
    assert status == 130
    first, second = text.index("Ctrl-C: what is under way is finished"), text.index("Ctrl-C again:")
    assert first < second and said in text[second:]


def test_a_ctrl_c_that_comes_twice_at_once_and_a_signal_of_the_launcher_are_one_request():
    """DeepSpeed's launcher answers Ctrl-C with SIGTERM to its ranks, which received it too."""
    process = started("""
done = []
signal.signal(signal.SIGUSR2, lambda number, frame: done.append(number))
with StopRequest().listening() as stop:
    stop.deferring = True
    ready()
    while not done:
        time.sleep(0.01)
    print(stop.signal, flush=True)
""")
    press(process, 3, apart=0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, str(int(signal.SIGINT)))
    assert said.count("Ctrl-C: ") == 1 and "at once, without saving; " not in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_run_that_is_still_starting_ends_on_the_first_signal(number, status, hangs):
    process = started(f"""
try:
    with StopRequest().listening():
        ready()
        hang() if {hangs} else time.sleep(60)
except StoppedWhileStarting as stopped:
    print("let go of locks", file=sys.stderr)
    sys.exit(exit_status(stopped.signal))
""")
    if hangs:
        time.sleep(0.5)  # it says that it is ready just before
    process.send_signal(number)
    found, said = ended(process)
    assert found == status
    assert ("let go of locks" in said) == (not hangs)


def test_a_signal_that_a_person_sends_counts_before_those_of_schedulers():
    assert agreed([0.0, float(signal.SIGTERM), float(signal.SIGINT)]) == signal.SIGINT
    assert agreed([0.0, 0.0]) == 0
    assert [exit_status(n) for n in (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [
        0, 130, 75, 75,
    ]  # fmt: skip


def test_signals_do_what_they_did_before_once_nobody_listens():
    from megagrow.train.health.signals import ASKING, StopRequest

    before = [signal.getsignal(number) for number in ASKING]
    with StopRequest().listening() as stop:
        stop.deferring = True
        assert [signal.getsignal(number) for number in ASKING] != before
    assert [signal.getsignal(number) for number in ASKING] == before
    assert signal.set_wakeup_fd(-1) == -1
