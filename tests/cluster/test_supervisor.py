"""The supervisor's verdicts, with real lightweight processes; each ends in every case."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
RANK = HERE / "light_rank.py"
PATIENT = 300  # seconds, on a machine with other work
QUICK = {"--backoff": "0.1", "--grace": "0.5", "--silence": "20", "--start": str(PATIENT)}


@pytest.fixture
def supervise(tmp_path):
    """Starts supervisors; ends whatever is left of them."""
    started = []

    def start(*arguments, ranks=3, options=(), environ=None, directory=tmp_path):
        quick = [word for pair in QUICK.items() if pair[0] not in options for word in pair]
        process = subprocess.Popen(
            [
                sys.executable, HERE / "light_supervise.py", *quick, "--logs", tmp_path / "logs",
                "--ranks", str(ranks), *map(str, options),
                RANK, "--dir", directory, *map(str, arguments),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for pid in pids(tmp_path):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def finish(process):
    out, err = process.communicate(timeout=PATIENT)
    return process.returncode, out, err


def starts(directory, rank=0):
    path = directory / f"starts_{rank}"
    return path.read_text().splitlines() if path.exists() else []


def pids(directory):
    return [int(line.split()[0]) for n in range(8) for line in starts(directory, n)]


def alive(directory):
    found = []
    for pid in pids(directory):
        try:
            if "light_rank" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:
            pass
    return found


def wait_until(condition, what):
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def wait_for_training(directory, step=1, ranks=3):
    """Wait until all ranks have started and handle signals, and some steps are saved."""
    wait_until(lambda: all(starts(directory, n) for n in range(ranks)), "all ranks")
    saved = directory / "saved"
    wait_until(lambda: saved.exists() and int(saved.read_text() or 0) >= step, "training")


def test_all_ranks_are_done(supervise, tmp_path):
    status, out, err = finish(supervise("--steps", 3, "a b", "100%", "$HOME"))
    assert (status, out, err) == (0, "rank 0 speaks\n", "")
    assert starts(tmp_path)[0].endswith("auto 3 a b 100% $HOME")
    logs = tmp_path / "logs" / "attempt_0001"
    assert (logs / "rank_00002.log").read_text() == "rank 2 speaks\n"
    assert (logs / "console.log").read_text() == "rank 0 speaks\n"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kill", r"rank 1 on \S+ \(pid \d+\) died without a word\n.* it was: counting, step \d"),
        ("leave", r"rank 1 on \S+ \(pid \d+\) died without a word"),
        ("raise", r"rank 1 on \S+ \(pid \d+\) failed\n  found: +RuntimeError: what a pity"),
        ("freeze", r"nothing was heard from rank 1 on \S+ \(pid \d+\) for \d+ s"),
    ],
)  # fmt: skip
def test_one_rank_fails(supervise, tmp_path, kind, message):
    """Whatever the launcher returns (here 0), and even if the other ranks notice nothing."""
    process = supervise(
        "--steps", 9999, "--fault", f"1:2:{kind}", options=["--restarts", 0, "--silence", 5]
    )
    status, _, err = finish(process)
    assert status == 1 and re.search(f"error: {message}", err), err
    assert f"see {tmp_path}/logs/attempt_0001" in err
    assert len(pids(tmp_path)) == 3 and alive(tmp_path) == []


def test_after_a_silence_no_last_words_are_awaited(supervise, tmp_path):
    """The others could say nothing: they would hang in a collective with the silent rank."""
    patience = ["--silence", "3", "--grace", str(10 * PATIENT), "--restarts", "0"]
    status, _, err = finish(supervise("--steps", 99999, "--fault", "1:2:freeze", options=patience))
    assert status == 1 and "nothing was heard from rank 1" in err
    assert alive(tmp_path) == []


def test_restarts_until_it_is_done(supervise, tmp_path):
    """Three failures, each after further progress was saved, under a limit of one."""
    faults = [part for n in (0, 1, 2) for part in ("--fault", f"{n}:{2 + 30 * n}:kill")]
    process = supervise("--steps", 90, *faults, "--resume", "never", options=["--restarts", 1])
    status, _, err = finish(process)
    assert status == 0, err
    assert (tmp_path / "saved").read_text() == "90"
    # A restart resumes, wherever the first attempt was told to start.
    assert [line.split()[1] for line in starts(tmp_path)] == ["never", "good", "good", "good"]
    assert err.count("starting again") == 3 and err.count("(number 1 of 1") == 3


def test_restarts_without_progress_are_limited(supervise, tmp_path):
    process = supervise("--steps", 9, "--fault", "0:3:kill", "--always", options=["--restarts", 2])
    status, _, err = finish(process)
    assert status == 1 and "--restarts allows no more" in err
    assert len(starts(tmp_path)) == 3 and alive(tmp_path) == []


def test_a_wrong_configuration_is_not_tried_again(supervise, tmp_path):
    status, _, err = finish(supervise("--fail-at-start"))
    assert status == 78 and len(starts(tmp_path)) == 1
    assert "layout.tensor does not divide" in err


def test_a_wrong_command_line_is_not_tried_again(supervise, tmp_path):
    """Status 2 before a word: Python's for a script that is not there, argparse's for an option."""
    status, _, err = finish(supervise("--steps", "many"))
    assert status == 1 and "starting again" not in err and "would not help" in err
    assert "SystemExit: 2" in err
    assert [path.name for path in (tmp_path / "logs").glob("attempt_*")] == ["attempt_0001"]


def test_a_rank_that_has_trained_and_ends_with_status_2_is_started_again(supervise, tmp_path):
    """Its command line was right."""
    status, _, err = finish(supervise("--fault", "1:2:exit2"))
    assert status == 0 and "SystemExit: 2" in err and len(starts(tmp_path)) == 2


def test_the_launcher_leaves_while_ranks_run(supervise, tmp_path):
    """What `deepspeed` does when its pdsh is killed: status 0, and the ranks stay alive."""
    process = supervise(
        "--steps",
        9999,
        options=["--restarts", 0],
        environ={"LIGHT_LAUNCHER": "1", "LAUNCHER_LEAVES": "1"},
    )
    status, _, err = finish(process)
    assert status == 1 and "the launcher ended: exit status 0" in err
    assert "3 ranks still run" in err
    assert alive(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on(supervise, tmp_path, number):
    process = supervise("--steps", 9999)
    wait_for_training(tmp_path)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 75, err
    passed = signal.SIGTERM if number == signal.SIGINT else number
    assert [(tmp_path / f"stopped_{n}").read_text() for n in range(3)] == [str(int(passed))] * 3
    assert len(starts(tmp_path)) == 1


def test_ranks_that_do_not_heed_a_signal(supervise, tmp_path):
    process = supervise("--steps", 9999, "--fault", "1:2:hang", options=["--stop", "1"])
    wait_for_training(tmp_path, step=4)
    process.terminate()
    status, _, err = finish(process)
    assert status == 1 and "did not save after the signal within 1 s" in err
    assert "rank 1 on " in err and alive(tmp_path) == []


def test_the_supervisor_is_killed(supervise, tmp_path):
    """Nothing is left to end the ranks: they end themselves."""
    process = supervise("--steps", 9999)
    wait_for_training(tmp_path)
    assert len(alive(tmp_path)) == 3
    process.kill()
    wait_until(lambda: alive(tmp_path) == [], "the ranks' end")


def test_ranks_that_never_start(supervise, tmp_path):
    process = supervise(ranks=2, options=["--start", "30", "--restarts", 0],
                        directory=tmp_path / "missing")  # fmt: skip
    status, _, err = finish(process)
    assert status == 1 and "FileNotFoundError" in err


def test_a_script_that_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "light_supervise.py", "nothing.py"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "found:    nothing.py" in done.stderr


# --- one supervisor a node ----------------------------------------------------------------

SECRET = "0123456789abcdef"


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def nodes(supervise):
    """Starts the supervisors of a job's nodes, by node index; None: without one."""
    port = free_port()

    def start(*arguments, numbers=(0, 1), secret=SECRET, count="2", options=()):
        ranked = [[] if n is None else ["--node-rank", n] for n in numbers]
        return [
            supervise(
                *arguments, ranks=2, environ={"MEGAGROW_SECRET": secret},
                options=["--nnodes", count, "--master", f"localhost:{port}", *rank, *options],
            )
            for rank in ranked
        ]  # fmt: skip

    return start


def worlds(directory, rank=0):
    """The world size of each start of a rank."""
    return [line.split()[2] for line in starts(directory, rank)]


def test_two_nodes(nodes, tmp_path):
    # The second joins first.
    ended = [finish(process) for process in nodes("--steps", 3, numbers=(1, 0))]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert [worlds(tmp_path, n) for n in range(4)] == [["4"]] * 4
    # The terminal shows rank 0 alone, on whatever node it is.
    assert sorted(out for _, out, _ in ended) == ["", "rank 0 speaks\n"]


def test_a_rank_of_a_node_dies(nodes, tmp_path):
    # Without a number, the first that can listen at --master decides.
    # Enough steps for the last rank to come before the first one is done.
    processes = nodes("--steps", 400, "--fault", "3:2:kill", numbers=(None, None))
    ended = [finish(process) for process in processes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    said = ended[0][2] + ended[1][2]
    assert re.search(r"rank 3 on .* died without a word\n.*; killed by SIGKILL", said), said
    assert len(starts(tmp_path, 3)) == 2 and (tmp_path / "saved").read_text() == "400"


def test_a_rank_that_fails_before_it_can_report(nodes, tmp_path):
    ended = [finish(p) for p in nodes("--no-such-option-of-it=1", "--steps", "x",
                                      options=["--restarts", 0, "--grace", 3])]  # fmt: skip
    assert [status for status, _, _ in ended] == [1, 1], ended


def test_the_signal_of_any_node_stops_all(nodes, tmp_path):
    processes = nodes("--steps", 9999)
    wait_for_training(tmp_path, ranks=4)
    processes[1].send_signal(signal.SIGUSR1)
    assert [finish(process)[0] for process in processes] == [75, 75]
    assert [(tmp_path / f"stopped_{n}").read_text() for n in range(4)] == ["10"] * 4


def test_a_signal_while_nodes_are_missing(nodes, tmp_path):
    [alone] = nodes(numbers=(0,))
    time.sleep(8)
    alone.send_signal(signal.SIGTERM)
    status, _, err = finish(alone)
    assert status == 75 and starts(tmp_path) == [], err


def test_a_node_is_lost_and_comes_back(nodes, tmp_path):
    first, second = nodes("--steps", 60)
    wait_for_training(tmp_path, ranks=4)
    second.kill()
    wait_until(lambda: len(alive(tmp_path)) == 0, "the ranks' end")
    [again] = nodes("--steps", 60, numbers=(1,))
    ended = [finish(first), finish(again)]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "the supervisor of node " in ended[0][2] or "died without a word" in ended[0][2]
    assert worlds(tmp_path) == ["4", "4"]


def test_fewer_nodes_and_more_again(nodes, tmp_path, monkeypatch):
    """A node that may be missing is left out; when it is back, all save and go on together."""
    first, second = nodes("--steps", 9999, count="1:2")
    wait_for_training(tmp_path, ranks=4)
    second.kill()
    wait_until(lambda: worlds(tmp_path) == ["4", "2"], "two ranks alone")
    step = int((tmp_path / "saved").read_text())
    wait_for_training(tmp_path, step=step + 2, ranks=2)
    [again] = nodes("--steps", 9999, numbers=(1,), count="1:2")
    wait_until(lambda: worlds(tmp_path) == ["4", "2", "4"], "four ranks again")
    step = int((tmp_path / "saved").read_text())
    wait_for_training(tmp_path, step=step + 2, ranks=4)
    again.send_signal(signal.SIGTERM)
    ended = [finish(first), finish(again)]
    assert [status for status, _, _ in ended] == [75, 75], ended
    assert "a further node is there: 2 ranks are told to save and stop" in ended[0][2]
    assert [line.split()[1] for line in starts(tmp_path)] == ["auto", "good", "good"]


def test_the_deciding_node_is_lost(nodes, tmp_path):
    first, second = nodes("--steps", 9999)
    wait_for_training(tmp_path, ranks=4)
    first.kill()
    status, _, err = finish(second)
    assert status == 1 and "the supervisor is gone" in err, err
    wait_until(lambda: alive(tmp_path) == [], "the ranks' end")


def test_nodes_that_do_not_belong_together(nodes, tmp_path):
    [first] = nodes(numbers=(0,), options=["--start", "20", "--restarts", 0])
    [other] = nodes(numbers=(1,), secret="fedcba9876543210")
    status, _, err = finish(other)
    assert status == 1 and "it does not know the job's secret" in err
    status, _, err = finish(first)
    assert status == 1 and re.search(r"[01] of at least 2 are there", err), err
    assert starts(tmp_path) == []


def test_the_secret_is_on_no_command_line_and_in_no_log(nodes, tmp_path):
    processes = nodes("--steps", 9999)
    wait_for_training(tmp_path, ranks=4)
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    processes[0].terminate()
    ended = [finish(process) for process in processes]
    assert not any(SECRET.encode() in line for line in lines)
    assert not any(SECRET in out + err for _, out, err in ended)
    logs = [path.read_text() for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert len(logs) >= 4 and not any(SECRET in text for text in logs)
