"""Background threads: none dies of an exception, and none fails without a word."""

import threading
import time

import pytest

from megagrow.background import Faults, Loop, Pool, Task, also_reporting_to, report
from megagrow.errors import DataError


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("kind", [TypeError, KeyboardInterrupt, MemoryError, GeneratorExit])
def test_a_loop_survives_whatever_its_turns_raise_and_reports_it(capsys, kind):
    turns = []

    def turn():
        turns.append(1)
        if len(turns) < 4:
            raise kind("a defect")

    loop = Loop("example", turn, every=0.001)
    loop.start()
    wait_until(lambda: len(turns) >= 6)
    assert loop.is_alive()
    loop.stop()
    assert not loop.is_alive()
    stated = capsys.readouterr().err
    assert stated.count("the thread example failed") == 1  # the 1st of three, the 10th would follow
    assert f"{kind.__name__}" in stated and 'raise kind("a defect")' in stated


def test_a_loop_ends_where_nothing_is_left_to_do_or_it_is_reported_to(capsys):
    done = Loop("done", lambda: True, every=0.0)
    done.start()
    done.join(20)

    def leave():
        raise SystemExit

    stated = Loop("told", leave, every=0.0)
    stated.start()
    stated.join(20)
    assert not done.is_alive() and not stated.is_alive()
    assert "the thread told failed; it was asked to stop" in capsys.readouterr().err


def test_a_fault_that_comes_again_and_again_is_reported_at_round_numbers(capsys):
    faults = Faults("a thread")
    for number in range(1, 101):
        with faults.reported("counting"):
            raise ValueError(number)
    with faults.reported("counting"):
        raise ValueError("elsewhere")
    stated = capsys.readouterr().err
    assert stated.count("error in the background: a thread, counting failed") == 4
    assert "(for the 10th time)" in stated and "(for the 100th time)" in stated


def test_a_report_goes_to_the_log_too_and_never_raises(capsys, monkeypatch):
    log = []

    def broken(text):
        raise OSError("disk full")

    with also_reporting_to(broken), also_reporting_to(log.append):
        report("a thread", DataError("no such file", fix="give another"))
        monkeypatch.setattr("sys.stderr", None)
        report("a thread", RuntimeError("defect"), times=10)
    monkeypatch.undo()
    report("a thread", RuntimeError("afterwards"))
    assert len(log) == 2 and "found:    no such file" in log[0] and "Traceback" not in log[0]
    assert "RuntimeError: defect" in log[1] and "for the 10th time" in log[1]


def fails(text="a defect"):
    raise RuntimeError(text)


def test_the_error_of_a_task_comes_out_where_its_result_is_asked_for(capsys):
    assert Task("adds", lambda: 1 + 1).result() == 2
    task = Task("fails", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        task.result()
    task.close()
    assert task.done() and capsys.readouterr().err == ""


def test_the_error_of_a_task_that_nobody_asks_for_is_reported(capsys):
    Task("fails", fails).close()
    stated = capsys.readouterr().err
    assert "the thread fails failed" in stated and "RuntimeError: a defect" in stated


def test_a_pool_gives_results_and_its_first_error_and_reports_the_others(capsys):
    with Pool(2, "workers") as pool:
        assert pool.map(lambda n: n * n, range(9)) == [n * n for n in range(9)]
        assert sorted(pool.each(len, ["a", "bb"])) == [("a", 1), ("bb", 2)]
    both = threading.Barrier(2)

    def work(kind):
        both.wait(20)
        if kind is not RuntimeError:  # the second one
            assert stated.wait(20)
        raise kind(kind.__name__)

    for other in (KeyError, DataError):
        stated = threading.Event()
        with Pool(2, "workers") as pool, pytest.raises(RuntimeError, match="RuntimeError"):
            list(pool.each(work, [RuntimeError, other], on_error=stated.set))
    text = capsys.readouterr().err
    assert "a thread of workers failed" in text and "KeyError" in text and "DataError" not in text
