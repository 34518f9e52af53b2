import io
import math

from megagrow.report.step_facts import FACTS, StepFacts
from megagrow.train.logging.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def advance(progress, step, *, stage=0):
    unshown = dict.fromkeys(FACTS, math.nan)
    shown = {"step": step, "loss": 3.21987, "tokens_per_second": 12_300.0, "growth_stage": stage}
    progress.step(StepFacts(**unshown | shown), flops_per_second=45.2e9)


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(total_steps=25, log_every=10, stream=stream)
    for step in range(1, 26):
        advance(progress, step, stage=step // 20)
    progress.say("the end")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 10/25",
        "step 20/25",
        "step 25/25",
        "the end",
    ]
    assert "stage 1  loss 3.2199  12.3 ktokens/s  45.2 GFLOP/s  " in lines[1]
    assert lines[2].endswith("00:00 left")
    assert "\r" not in stream.getvalue()


def test_a_bar_on_a_terminal_with_lines_that_do_not_break_it():
    stream = Terminal()
    progress = Progress(total_steps=4, stream=stream)
    progress.go_on_from(2)
    assert "2/4" in stream.getvalue()
    advance(progress, 3, stage=1)
    progress.say("checkpoint saved")
    progress.close()
    progress.close()
    shown = stream.getvalue()
    # The line begins where the bar was wiped out, and the bar is drawn again below it.
    assert "\rcheckpoint saved\n" in shown
    last = shown.split("\r")[-1]
    for fact in ("stage 1", "3/4", "loss 3.2199", "12.3 ktokens/s", "45.2 GFLOP/s", "75%"):
        assert fact in last, (fact, last)


def test_the_time_left_counts_from_the_resumed_step(monkeypatch):
    clock = iter([50.0, 100.0, 110.0, 130.0])  # made, resumed, and two lines
    monkeypatch.setattr("megagrow.train.logging.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(total_steps=100, log_every=10, stream=stream)
    progress.go_on_from(50)
    advance(progress, 60)  # 1 s a step, 40 steps left
    advance(progress, 70)  # 2 s a step after a growth, 30 left
    first, second = stream.getvalue().splitlines()
    assert first.endswith("00:40 left")
    assert second.endswith("01:00 left")


def test_an_end_that_moves_is_followed():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(total_steps=100, log_every=10, stream=stream)
        progress.ends_at(40)
        advance(progress, 40)
        progress.close()
        assert "40/40" in stream.getvalue().split("\r")[-1]


def test_other_ranks_are_silent():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(total_steps=2, log_every=1, speaking=False, stream=stream)
        advance(progress, 1)
        progress.say("nothing")
        progress.close()
        assert stream.getvalue() == ""
