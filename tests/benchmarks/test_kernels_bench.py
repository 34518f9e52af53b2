"""The kernel benchmark: every step in a dry run, and what it rejects."""

import pytest
import torch

from benchmarks import kernels
from megagrow.errors import ConfigError
from megagrow.ops.schemas import SCHEMAS


def test_a_cpu_is_told_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        kernels.measure()


def test_every_op_has_a_row_with_its_rivals():
    result = kernels.measure(dry_run=True)
    rows = {(row["op"], row["pass"]): row for row in result["rows"]}
    ops = {name.split()[0] for name, _ in rows}
    wanted = {name.rstrip("_").removesuffix("_backward") for name in SCHEMAS}
    assert ops == wanted - {"softmax_stats"}
    for name in ("rms_norm", "layer_norm", "swiglu", "bias_gelu"):
        for pass_ in ("forward", "backward"):
            assert {"own", "eager", "compiled"} <= set(rows[name, pass_]["milliseconds"])
    assert not any("failed" in row for row in result["rows"])
    text = kernels.table(result)
    assert "mean nothing" in text and all(name in text for name in ops)


def test_a_win_is_one_in_every_pass():
    def row(op, own, compiled):
        times = {"own": {"median": own}, "compiled": {"median": compiled}}
        return {"op": op, "milliseconds": times}

    rows = [row("a", 1.0, 2.0), row("a", 1.0, 1.01), row("b", 1.0, 1.2), row("b", 2.0, 2.2)]
    assert kernels.wins([*rows, {"op": "c", "milliseconds": {"own": {"median": 1.0}}}]) == ["b"]
