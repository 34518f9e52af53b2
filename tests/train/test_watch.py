"""The watch: which rank blocks a job, and that a job that hangs is ended."""

import json
import os
import signal
import sys
import threading
import time
import types

import pytest
from torch.distributed import HashStore

from megagrow.config import WatchConfig
from megagrow.train.health.watch import Beat, Watch, blame, waits_in
from tests.jobs import launch, settings, write_config


def beat(rank, *, count=5, doing="step 8, micro-batch 1", waiting="", idle=1.0):
    return Beat(rank, f"h{rank}", 100 + rank, count, doing, waiting, idle)


def later(beats, *, still=()):
    return [b if b.rank in still else Beat(**{**b.__dict__, "count": b.count + 3}) for b in beats]


def test_a_rank_whose_beats_stopped():
    beats = [beat(0, waiting="all_reduce"), beat(1), beat(2, waiting="all_reduce")]
    text = blame(beats, later(beats, still=[1]), world=3)
    assert text.startswith("rank 1 on h1 (pid 101) is gone or stopped") and "rank 2" not in text


def test_a_rank_that_the_others_wait_for():
    beats = [beat(0, waiting="all_gather"), beat(1, doing="saving step 8")]
    text = blame(beats, later(beats), world=2)
    assert "rank 1 on h1 (pid 101) is doing: saving step 8" in text and "all_gather" in text


def test_nobody_stands_out():
    beats = [beat(0, waiting="barrier", idle=3.0), beat(1, waiting="barrier", idle=9.0)]
    assert "longest without progress: rank 1" in blame(beats, later(beats), world=2)


def test_a_rank_that_never_came_up():
    assert blame([beat(0)], later([beat(0)]), world=3) == "ranks 1, 2 never came up"


class Work:
    """Like a collective's handle: its `wait` has no Python frame."""

    def __init__(self):
        self.lock = threading.Lock()
        self.lock.acquire()
        self.wait = self.lock.acquire


def test_a_stack_that_waits():
    def in_a_bucket(work):
        work.wait()

    work = Work()
    thread = threading.Thread(target=in_a_bucket, args=(work,))
    thread.start()
    time.sleep(0.1)
    assert waits_in(sys._current_frames()[thread.ident]) == "in_a_bucket"
    work.lock.release()
    thread.join()
    assert waits_in(sys._getframe()) == ""


def make(tmp_path, rank, store, ended, *, world=2, stall=0.3):
    return Watch(
        rank=rank,
        world=world,
        config=WatchConfig(stall=stall, slow=5.0),
        store=store,
        log=tmp_path / f"rank_{rank}.log",
        exit=lambda status: (ended.append((rank, status)), sys.exit()),
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_that_stands_still_ends_on_all_ranks(tmp_path, capsys):
    """Two watches in one process: one sees no progress, the other is told to end."""
    store, ended = HashStore(), []
    one, two = make(tmp_path, 0, store, ended), make(tmp_path, 1, store, ended, stall=60.0)
    two._key = one._key
    with one, two:
        one.begin("step 3, micro-batch 1", step=2)
        two.begin("step 3, micro-batch 1", step=2)
        deadline = time.monotonic() + 20
        while len(ended) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert sorted(ended) == [(0, 1), (1, 1)]
    error = capsys.readouterr().err
    assert error.count("error: no progress for") == 1 and "rank 0 on" in error
    assert "watch.stall" in error and "--resume auto" in error and str(tmp_path) in error
    for rank in (0, 1):
        log = (tmp_path / f"rank_{rank}.log").read_text()
        assert f"stacks of rank {rank}" in log and "test_watch.py" in log


def _lineless():
    """Busy in instructions without a line number, as in some training frames."""

    def spin(seconds):
        import time

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    return types.FunctionType(spin.__code__.replace(co_linetable=b""), globals())


def _sees_a_stall(tmp_path, work):
    """Whether a watch notices that nothing happens during `work`."""
    ended = []
    watch = make(tmp_path, 0, None, ended, world=1)
    watch._exit = lambda status: ended.append(status)
    with watch:
        watch.begin("step 3", step=2)
        work(watch)
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
        return watch._thread.is_alive() and ended[:1] == [1]


def test_a_watch_sees_a_stall_after_frames_without_line_numbers(tmp_path, capsys):
    assert _sees_a_stall(tmp_path, lambda watch: _lineless()(0.25))
    assert "in the background" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["_waiting", "_beat", "explain", "note", "_dump_stacks"])
def test_a_watch_sees_a_stall_whatever_part_of_it_fails_and_says_so(tmp_path, capsys, part):
    def breaks(*_):
        raise TypeError("a defect of the watch")

    def work(watch):
        setattr(watch, part, breaks)
        watch._store = HashStore()

    assert _sees_a_stall(tmp_path, work)
    stated = capsys.readouterr().err
    assert "error in the background" in stated and "TypeError: a defect of the watch" in stated


def test_progress_keeps_it_quiet(tmp_path):
    ended = []
    with make(tmp_path, 0, None, ended, world=1) as watch:
        for _ in range(8):
            time.sleep(0.1)
            watch.begin("step", step=2)
        watch.begin("saving", step=2, slow=True)
        time.sleep(0.8)
    assert ended == []


def test_the_share_of_time_that_a_rank_waits(tmp_path):
    with make(tmp_path, 0, HashStore(), [], world=1, stall=60.0) as watch:
        watch.busy_share()
        work = Work()
        work.wait(timeout=0.5)
        assert watch.busy_share() < 0.5
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            sum(range(1000))
        assert watch.busy_share() > 0.5


# --- with real jobs -----------------------------------------------------------------------


def _hang(rank, bad_rank, step, how):
    """Make a rank stop in the middle of a step."""
    from megagrow.engine.engine import Engine

    train_step = Engine.train_step

    def stuck(self, *args, **more):
        nonlocal step
        step -= 1
        if step == 0 and rank == bad_rank:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        return train_step(self, *args, **more)

    Engine.train_step = stuck


@pytest.mark.parametrize("how", ["hangs", "stopped"])
def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path, dataset, how):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    command = ["--config", config, "watch.stall=2"]
    with pytest.raises(AssertionError, match="ended without a word"):
        launch(2, command, hook=(_hang, 1, 5, how), timeout=150.0)
    logs = [(tmp_path / "run" / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1)]
    stated = [log for log in logs if "no progress for" in log]
    assert stated and all("stacks of rank" in log for log in stated)
    if how == "stopped":
        assert "rank 1 on" in stated[0] and "is gone or stopped" in stated[0]
    else:
        assert "while the others wait for it in" in stated[0] and "rank 1 on" in stated[0]
        assert "stuck" in logs[1]  # where it hangs
    trained = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in trained if x["event"] == "step"] == [1, 2, 3, 4]
