"""The recovery benchmark: a real job is hit, and the parts add up to the whole."""

import json

import pytest

from benchmarks import recovery
from benchmarks.command_line import parse
from megagrow.processes import StartUp


@pytest.mark.parametrize(
    "fault", [pytest.param("rank"), pytest.param("host", marks=pytest.mark.slow)]
)
def test_a_job_is_hit_and_recovers(tmp_path, fault):
    result = recovery.measure(
        fault=fault, parameters=2e5, repetitions=1, silence=8.0, backoff=0.5, directory=tmp_path
    )
    parts = {name: seconds for name, [seconds] in result["parts"].items()}
    assert {"detection", "teardown", "imports", "rendezvous", "engine", "checkpoint",
            "first step"} <= set(parts)  # fmt: skip
    assert all(seconds >= -0.05 for seconds in parts.values()), parts
    assert result["total"] == [pytest.approx(sum(parts.values()))]
    own = sum(parts.values()) - parts["detection"] - parts["wait"]
    assert result["total_without_detection_and_wait"] == [pytest.approx(own)]
    # Known by its closed connection, or only by its silence.
    assert (parts["detection"] < 5) == (fault == "rank")
    assert "| imports |" in recovery.table(json.loads(json.dumps(result)))


def test_parts_add_up_from_the_fault_to_the_first_step():
    supervisor = [
        {"event": "attempt", "number": 1, "wait": 0.0, "time": 1.0},
        {"event": "failure", "time": 10.5},
        {"event": "ending", "time": 12.0},
        {"event": "ended", "time": 12.5},
        {"event": "attempt", "number": 2, "wait": 3.0, "time": 12.5},
    ]
    run = [
        {"event": "step", "time": 9.0},
        {"event": "resume", "start_up": {"imports": 4.0, "engine": 1.0}, "time": 21.0},
        {"event": "step", "time": 23.0},
    ]
    assert recovery._parts(10.0, run, supervisor) == {
        "detection": 0.5,
        "last words of the other ranks": 1.5,
        "teardown": 0.5,
        "wait": 3.0,
        "nodes meet, ranks start": 0.5,
        "imports": 4.0,
        "engine": 1.0,
        "first step": 2.0,
    }


def test_the_model_is_as_large_as_asked():
    assert recovery.build_catalog(recovery._model(50e6)).parameters >= 50e6


def test_options_have_the_supervisor_s_defaults():
    options = parse(["recovery"])
    assert (options.silence, options.backoff, options.fault) == (30.0, 5.0, "rank")


def test_a_start_counts_only_where_it_began():
    start = StartUp()
    start.ends("imports")
    assert start.take() == {}
    start.begin()
    start.ends("imports")
    start.ends("engine")
    start.ends("imports")
    parts = start.take()
    assert list(parts) == ["python", "imports", "engine"] and min(parts.values()) >= 0
    assert parts["python"] > 0.5  # since this process was made
    start.ends("later")
    assert start.take() == {}
