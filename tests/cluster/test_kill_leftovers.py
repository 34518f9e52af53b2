"""Kill what has a job's mark, and nothing else."""

import os
import subprocess
import sys

from megagrow.cluster.kill_leftovers import VARIABLE, marked, sweep


def sleeper(mark, code="import time; time.sleep(600)"):
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); " + code],
        env={**os.environ, VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    return process


def test_only_the_marked_ones():
    mine, other = sleeper("abc"), sleeper("abcd")
    # In its own session, orphaned, ignoring SIGTERM, and under another name.
    stray = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.setsid(); " \
            "print(os.getpid(), flush=True); time.sleep(600)"  # fmt: skip
    double = sleeper(
        "abc", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stray!r}])"
    )
    orphan = int(double.stdout.readline())
    assert double.wait(60) == 0
    assert {mine.pid, orphan} == set(marked("abc"))
    killed, left = sweep("abc")
    assert (killed, left) == (2, []) and mine.wait(60) == -9
    assert other.poll() is None and marked("abcd") == [other.pid]
    other.kill()
    other.wait()


def test_as_a_command():
    process = sleeper("def")
    done = subprocess.run(
        [sys.executable, "-m", "megagrow.cluster.kill_leftovers", "def"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "ended 1 processes\n"
    assert process.wait(60) == -9
