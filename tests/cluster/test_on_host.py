"""What runs on a host over ssh: kills what has a job's mark, and nothing else; keeps the secret."""

import os
import socket
import subprocess
import sys

import pytest

from megagrow.cluster import wire
from megagrow.cluster.on_host import MARK, marked, secrets_of, store, sweep


def sleeper(mark, code="import time; time.sleep(600)"):
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); " + code],
        env={**os.environ, MARK: mark},
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


def on_host(*words, given=""):
    return subprocess.run(
        [sys.executable, "-m", "megagrow.cluster.on_host", *map(str, words)],
        input=given, capture_output=True, text=True,
    )  # fmt: skip


def test_clear():
    process = sleeper("def")
    done = on_host("clear", "def")
    assert (done.returncode, done.stderr) == (0, "")
    assert process.wait(60) == -9


def test_check_keeps_the_secret_for_this_user_alone(tmp_path):
    mark, script = f"test{os.getpid()}", tmp_path / "script.py"
    script.touch()
    with socket.create_server(("127.0.0.1", 0)) as supervisor:
        port = supervisor.getsockname()[1]
        words = ["check", mark, "--supervisor", "127.0.0.1", port, "--script", script]
        done = on_host(*words, given="0123456789abcdef")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        [path] = secrets_of(mark).iterdir()
        assert path.stat().st_mode & 0o077 == secrets_of(mark).stat().st_mode & 0o077 == 0
        found = wire.secret_of({wire.SECRET_FILE: str(secrets_of(mark))})
        assert found == b"0123456789abcdef"
        done = on_host(*words, "--free", port, given="0123456789abcdef")
        assert done.returncode == 1 and f"port {port}, for rank 0" in done.stderr
        assert "File exists" in done.stderr  # nobody's file is taken over
    script.unlink()
    done = on_host(*words)
    assert "is not there: the directory is not shared" in done.stderr
    assert f"the supervisor at 127.0.0.1:{port} cannot be reached from here" in done.stderr
    assert on_host("clear", mark).returncode == 0 and not secrets_of(mark).exists()


def test_a_directory_of_another_users_is_not_used(tmp_path):
    mark = f"other{os.getpid()}"
    for make in (lambda p: p.mkdir(mode=0o755), lambda p: p.symlink_to(tmp_path)):
        make(secrets_of(mark))
        with pytest.raises(PermissionError):
            store(mark, "secret")
        assert list(tmp_path.iterdir()) == []
        (secrets_of(mark).unlink if secrets_of(mark).is_symlink() else secrets_of(mark).rmdir)()
