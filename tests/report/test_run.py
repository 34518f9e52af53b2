"""Summary of a log: the share of useful time."""

import math

import pytest

from megagrow.report.run import summarize
from megagrow.report.step_facts import AVERAGED, FACTS, TIMELESS, StepFacts
from megagrow.report.thin import Steps
from megagrow.train.logging.metrics import MetricsLog, read_metrics
from tests.jobs import TRAJECTORY


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


def test_every_number_of_a_step_is_written_read_and_averaged(tmp_path):
    """Each fact of two steps differs, so that none is taken for another."""
    log = MetricsLog(tmp_path)
    facts = []
    for number in (1, 2):
        values = {name: 10.0 * number + at for at, name in enumerate(FACTS)}
        facts.append(StepFacts(**values | {"step": number, "growth_stage": 0}))
        log.step(facts[-1])
    log.close()
    lines = read_metrics(log.path)
    assert [list(one) for one in lines] == [["event", *FACTS, "time"]] * 2
    assert list(summarize(lines).steps) == facts
    steps = Steps(most=1)
    for one in facts:
        steps.add(one)
    [mean] = steps.means()
    for name in AVERAGED:
        assert getattr(mean, name) == sum(getattr(one, name) for one in facts) / 2
    assert set(FACTS) - set(AVERAGED) == {"step", "growth_stage"}


def test_what_a_repeated_step_has_again_is_all_but_its_speed():
    assert TIMELESS == TRAJECTORY
