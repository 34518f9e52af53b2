"""Locks of directories: one holder, whoever is gone makes room, whoever lost one knows it."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megagrow import lock as module
from megagrow.errors import LockError
from megagrow.lock import NAME, LockHolder, acquire, beside, holding_output
from megagrow.processes import started


def write(path, holder, *, age=0.0):
    """A lock file that another process left, last refreshed so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


def other_host(**changes):
    return replace(LockHolder.me(), host="h7", machine="another boot", token="f" * 16, **changes)


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def take(path, said=None, **more):
    return acquire(path, of="the output", say=([] if said is None else said).append, **more)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_job_is_refused_and_reported_who_has_it(tmp_path):
    path = tmp_path / "new" / NAME
    first = take(path)
    with pytest.raises(LockError) as caught:
        take(path)
    text = str(caught.value)
    me = LockHolder.me()
    assert f"process {me.pid} on {me.host}, since 20" in text and "pytest" in text
    first.release()
    assert list(path.parent.iterdir()) == []
    take(path).release()


def test_the_error_names_a_command_that_takes_over_and_the_other_job_notices(tmp_path):
    path = tmp_path / "a directory" / NAME
    first = take(path)
    with pytest.raises(LockError) as caught:
        take(path)
    [command] = re.findall("take over: (rm .*)", str(caught.value))
    subprocess.run(shlex.split(command), check=True)
    assert "was removed" in first.lost()
    second = take(path)
    with pytest.raises(LockError, match="lost its lock and stops"):
        first.require()
    first.release()  # leaves the other's alone
    assert not second.lost() and path.exists()
    second.release()


@pytest.mark.parametrize("how", ["gone", "another with its number", "zombie"])
def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once_and_said(tmp_path, how):
    child = subprocess.Popen(["sleep", "100"])
    begun = started(child.pid)
    pid = child.pid
    if how == "another with its number":
        begun -= 1
    else:
        child.kill()
        wait_until(lambda: started(child.pid) is None)  # not yet waited for: a zombie
    if how == "gone":
        child.wait()
    write(tmp_path / NAME, replace(LockHolder.me(), pid=pid, started=begun, token="a" * 16))
    said = []
    mine = take(tmp_path / NAME, said)
    assert len(said) == 1 and "taken over from a job that has ended" in said[0]
    assert f"process {pid} on" in said[0] and not mine.lost()
    mine.release()
    child.kill()
    child.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_runs_keeps_its_lock_however_old_it_is(tmp_path):
    child = subprocess.Popen(["sleep", "100"])
    holder = replace(LockHolder.me(), pid=child.pid, started=started(child.pid))
    write(tmp_path / NAME, holder, age=9999.0)
    try:
        with pytest.raises(LockError, match=r"sign of life was 9999 s ago"):
            take(tmp_path / NAME)
    finally:
        child.kill()
        child.wait()


def test_a_lock_of_another_host_counts_by_its_age_on_the_file_systems_clock(tmp_path, monkeypatch):
    # This machine's own clock is a day ahead: it does not matter.
    monkeypatch.setattr(module.time, "time", lambda: 86400.0 + 1.8e9)
    path = tmp_path / NAME
    write(path, other_host(), age=module.SILENT - 55)
    with pytest.raises(LockError, match="on h7, since"):
        take(path)
    write(path, other_host(), age=module.SILENT + 5)
    said = []
    take(path, said).release()
    assert "no refresh for 65 s" in said[0] and "on h7" in said[0]


def test_a_lock_of_another_host_is_waited_for_until_it_is_known_to_be_gone(tmp_path, monkeypatch):
    for name, seconds in (("BEAT", 0.2), ("SILENT", 1.2)):
        monkeypatch.setattr(module, name, seconds)
    write(tmp_path / NAME, other_host(), age=0.9)  # three beats are missing
    said = []
    take(tmp_path / NAME, said).release()
    assert "waiting up to" in said[0] and "taken over" in said[1]


def test_it_is_waited_for_a_job_that_comes_to_its_end(tmp_path):
    first, said = take(tmp_path / NAME), []
    waiting = threading.Thread(target=lambda: (wait_until(lambda: said), first.release()))
    waiting.start()
    second = take(tmp_path / NAME, said, wait=20.0)
    waiting.join()
    assert len(said) == 1 and "another job has it" in said[0] and "waiting up to 20 s" in said[0]
    second.release()


def test_a_lock_is_refreshed_while_it_is_held_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    path = tmp_path / NAME
    mine = take(path)
    os.utime(path, (0, 0))
    wait_until(lambda: path.stat().st_mtime > 1e9)
    mine.release()
    assert not mine._loop.is_alive() and not path.exists()


@pytest.mark.parametrize("links", [True, False], ids=["link", "no links"])
def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path, monkeypatch, links):
    if not links:

        def refused(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / NAME
    for _ in range(10):
        write(path, replace(LockHolder.me(), pid=dead_pid(), token="b" * 16))
        got, start = [], threading.Barrier(6)

        def race(got=got, start=start):
            start.wait()
            with contextlib.suppress(LockError):
                got.append(take(path))

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and not got[0].lost()
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_job_that_died_while_it_took_over_is_no_obstacle(tmp_path):
    dead = replace(LockHolder.me(), pid=dead_pid(), token="c" * 16)
    write(tmp_path / NAME, dead)
    write(tmp_path / f"{NAME}.{'c' * 16}.taken", replace(dead, token="d" * 16))
    # And one before it that never came so far.
    write(tmp_path / f"{NAME}.{'e' * 16}", replace(dead, token="e" * 16))
    take(tmp_path / NAME).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"pid": 1}', b"\xff"])
def test_a_file_that_says_nothing_counts_as_a_lock_until_it_is_old(tmp_path, content):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(LockError, match="a lock without a name"):
        take(path)
    os.utime(path, (0, 0))
    take(path).release()


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LockError, match="the output: cannot be written"):
        take(tmp_path / "file" / "below" / NAME)


# --- outputs of commands ------------------------------------------------------------------


def refused(output, why):
    with pytest.raises(LockError, match=why), holding_output(output):
        pass


def test_an_output_is_locked_beside_it_under_any_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with holding_output(Path("out")):
        refused(tmp_path / "out", "another job is writing there")
    assert beside(Path("out")) == tmp_path / ".out.lock" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step_00000400"])
def test_nothing_is_written_into_a_run_that_trains(tmp_path, below):
    run = take(tmp_path / "run" / NAME)
    refused(tmp_path / "run" / below, r"the run .*run, which .* belongs to")
    run.release()
    with holding_output(tmp_path / "run" / below):
        pass


def test_a_command_that_loses_its_output_is_interrupted_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "BEAT", 0.05)
    ours = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)

    def command():
        with holding_output(tmp_path / "out"):
            beside(tmp_path / "out").unlink()
            time.sleep(20)

    try:
        with pytest.raises(LockError, match="lost its lock and stops"):
            command()
        assert "was removed or renamed; this job stops writing" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_command_in_the_background_of_a_shell_is_ended_as_well(tmp_path):
    """There SIGINT is ignored."""
    code = f"""
import signal, time
from pathlib import Path
from megagrow import lock
signal.signal(signal.SIGINT, signal.SIG_IGN)
lock.BEAT = 0.05
with lock.holding_output(Path({str(tmp_path / "out")!r})):
    lock.beside(Path({str(tmp_path / "out")!r})).unlink()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=59)
    assert done.returncode == -signal.SIGTERM and "this job stops writing" in done.stderr


def test_a_real_command_that_is_killed_makes_room_at_once(tmp_path):
    code = f"""
import time
from pathlib import Path
from megagrow.lock import holding_output
with holding_output(Path({str(tmp_path / "out")!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    refused(tmp_path / "out", rf"process {child.pid} on ")
    child.kill()  # and nobody has waited for it yet
    wait_until(lambda: started(child.pid) is None)
    with holding_output(tmp_path / "out"):
        pass
    child.communicate()


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(5, "EIO"), LockError)]
)
def test_what_fails_right_after_a_lock_is_taken_leaves_none(tmp_path, monkeypatch, error, raised):
    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sweep", fails)
        with pytest.raises(raised), holding_output(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())
    with holding_output(tmp_path / "out"):
        pass
