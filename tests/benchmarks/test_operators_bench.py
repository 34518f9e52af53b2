"""The operator comparison: real runs, each at most once, and a table of the results."""

import time
import xml.etree.ElementTree as ElementTree

from benchmarks import operators as bench
from megagrow.growth.registry import OPERATORS
from tests.ranks import run_ranks

_MODEL = {"family": "gpt2", "layers": 1, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8}
_CASES = [
    bench.Case("width", bench.SMALL),
    bench.Case("depth", bench.SCRATCH),
    bench.Case("depth", "depth_stack", "copy"),
]


def _train(comm, protocol, work, untils):
    bench._MODEL, bench._GROWN = _MODEL, {"depth": {"layers": 2}}
    bench.cases = lambda: _CASES
    return [bench.train_all(comm, protocol, work, until) for until in untils]


def test_all_operators_that_enlarge_width_or_depth_have_a_case_for_each_policy():
    found = {(case.operator, case.policy) for case in bench.cases()}
    for name in ("width", "width_diag", "width_split", "width_noise", "width_random",
                 "depth_stack", "depth_interleave", "depth_identity", "ligo"):  # fmt: skip
        assert {(name, policy) for policy in OPERATORS[name].policies} <= found
    assert len({case.directory for case in bench.cases()}) == len(bench.cases())


def test_runs_are_made_once_and_compared(dataset, tmp_path, monkeypatch):
    protocol = bench.Protocol(dataset, seeds=(1, 2), small_steps=4, grown_steps=4, batch=2)
    [[stopped, complete]] = run_ranks(1, _train, protocol, tmp_path, [time.time() - 1, None])
    assert (stopped, complete) == (False, True)
    monkeypatch.setattr(bench, "cases", lambda: _CASES)
    first = bench.results(protocol, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert run_ranks(1, _train, protocol, tmp_path, [None]) == [[True]]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert bench.results(protocol, tmp_path) == first
    small, scratch, stacked = first
    assert [len(one["seeds"]) for one in first] == [2, 2, 2]
    assert stacked["parameters"] == scratch["parameters"] > small["parameters"]
    # The same samples: after the growth every case has seen as many tokens as the control.
    ends = {one["seeds"]["1"][-1]["tokens"] for one in first}
    assert ends == {8 * 2 * 8}
    assert small["jump"] is None and abs(stacked["jump"]) > 1e-6
    gap, error = bench.against(stacked, small)
    by_hand = [stacked["seeds"][s][-1]["loss"] - small["seeds"][s][-1]["loss"] for s in "12"]
    assert abs(gap - sum(by_hand) / 2) < 1e-12
    assert abs(error - abs(by_hand[0] - by_hand[1]) / 2) < 1e-12
    text = bench.table(first)
    assert "| depth_stack copy |" in text and "| not grown |" in text and "| 2 |" in text
    drawn = bench.figures(first)
    assert set(drawn) == {"width", "depth", "policies"}
    assert "depth_stack copy" in drawn["depth"] and "depth_stack" not in drawn["width"]
    assert all(ElementTree.fromstring(figure).tag.endswith("svg") for figure in drawn.values())
