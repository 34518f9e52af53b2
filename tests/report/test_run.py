"""Summary of a log: the share of useful time."""

import math

import pytest

from megagrow.report.run import summarize


def line(event, time, **fields):
    return {"event": event, "time": time, **fields}


def step(number, time, *, seconds=2.0):
    return line("step", time, step=number, tokens=number * 100, flops=number,
                tokens_per_second=100 / seconds, loss=3.0, growth_stage=0)  # fmt: skip


def test_goodput_counts_steps_that_were_kept_against_all_time():
    """10 s to start, 3 steps of 2 s, 4 s of saving, 80 s down, 1 more step."""
    lines = [
        line("run_start", 0.0, step=0),
        *(step(n, 10.0 + 2 * n) for n in (1, 2, 3)),
        line("checkpoint", 20.0, step=3),
        line("resume", 98.0, step=3, tokens=300),
        step(4, 100.0),
    ]
    run = summarize(lines)
    assert (run.useful_seconds, run.elapsed_seconds) == (8.0, 100.0)
    assert run.goodput == pytest.approx(0.08)
    assert run.seconds == 22.0  # running, without the start


def test_a_clock_that_jumps_back_takes_no_time_away():
    run = summarize(
        [line("run_start", 1000.0, step=0), step(1, 1002.0), step(2, 4.0), step(3, 6.0)]
    )
    assert (run.useful_seconds, run.elapsed_seconds, run.goodput) == (6.0, 4.0, 1.0)


def test_nothing_is_known():
    assert math.isnan(summarize([]).goodput)
