"""Each fused op on a GPU: bandwidth against the measured copy, and time against its rivals.

Rivals are eager PyTorch, torch.compile, and apex, Transformer Engine and Liger if installed.

Bytes are the minimum that an op must move, whatever it actually moves.  Tensors are much larger
than the L2 cache.  `dry_run` uses tiny sizes on the CPU with the emulated kernels: it shows that
every step works, and its times are meaningless.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch._functorch import config as functorch_config

from benchmarks.kernel_cases import Call, Case, Device, every_case
from megagrow.errors import ConfigError
from megagrow.ops import library

_WIN = 1.05  # our op is used under torch.compile if it is at least this much faster


def measure(*, dry_run: bool = False) -> dict[str, Any]:
    """Measure all ops.

    Raises:
        ConfigError: there is no CUDA device, or the kernels are not built.
    """
    if not dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "kernels: there is no CUDA device, and a CPU trains with PyTorch's own ops",
            fix="run this on a machine with a GPU (kernels/README.md), or add --dry-run, which "
            "shows with emulated kernels that every step works",
        )
    device = Device("cpu", 512, 0, 1) if dry_run else Device("cuda")
    # Graphs are traversed more than once, so their buffers must outlive a backward pass.
    functorch_config.donated_buffer = False
    with library.using("emulated" if dry_run else "cuda"):
        copy = _copy_bandwidth(device)
        rows = [_row(case, device, copy) for case in every_case(device)]
    return {
        "benchmark": "kernels",
        "dry_run": dry_run,
        "device": torch.cuda.get_device_name() if not dry_run else "cpu, emulated",
        "copy_bytes_per_second": copy,
        "rows": rows,
        "wins_over_compile": wins(rows),
    }


def wins(rows: list[dict[str, Any]]) -> list[str]:
    """The ops whose own kernels beat torch.compile in every pass compared."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if "compiled" in row["milliseconds"]:
            faster = (
                row["milliseconds"]["compiled"]["median"] / row["milliseconds"]["own"]["median"]
            )
            ratios.setdefault(row["op"], []).append(faster)
    return sorted(op for op, all_ in ratios.items() if min(all_) >= _WIN)


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    copy = result["copy_bytes_per_second"]
    lines = [f"{result['device']}: copy {copy / 1e12:.3f} TB/s (read and written)"]
    if result["dry_run"]:
        lines.append("dry run: tiny, on the CPU, emulated; the times mean nothing")
    lines.append(
        f"{'op':<16}{'pass':<10}{'MB':>9}{'own ms':>9}{'of copy':>9}"
        f"{'x eager':>9}{'x compile':>10}{'extra MB':>10}  others"
    )
    for row in result["rows"]:
        times = {name: t["median"] for name, t in row["milliseconds"].items()}
        own = times["own"]
        ratio = {name: f"{t / own:.2f}" for name, t in times.items()}
        others = ", ".join(
            f"{n} x{r}" for n, r in ratio.items() if n not in ("own", "eager", "compiled")
        )
        lines.append(
            f"{row['op']:<16}{row['pass']:<10}{row['bytes'] / 1e6:>9.0f}{own:>9.3f}"
            f"{row['fraction_of_copy']:>9.0%}{ratio['eager']:>9}{ratio.get('compiled', '-'):>10}"
            f"{row['extra_bytes']['own'] / 1e6:>10.0f}  {others}{row.get('failed', '')}"
        )
    lines.append("faster than torch.compile in every pass: " + (
        ", ".join(result["wins_over_compile"]) or "none"
    ))  # fmt: skip
    return "\n".join(lines)


# --- timing ---------------------------------------------------------------------------------


def _time(call: Call, device: Device) -> dict[str, float]:
    """Time of a call in milliseconds: median, tenth and ninetieth percentile."""
    for _ in range(device.warm_ups):
        call()
    times: list[float] = []
    if device.name == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(device.calls + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        for _ in range(device.calls):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    tenth = len(times) // 10
    return {"median": statistics.median(times), "p10": times[tenth], "p90": times[-1 - tenth]}


def _extra_bytes(call: Call, device: Device) -> int:
    """Peak memory of a call, beyond what was already allocated."""
    if device.name != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _copy_bandwidth(device: Device) -> float:
    source = device.randn(device.size(1 << 30), dtype=torch.float32)
    target = torch.empty_like(source)
    milliseconds = _time(lambda: target.copy_(source), device)["median"]
    return 2 * source.nbytes / (milliseconds / 1e3)


def _row(case: Case, device: Device, copy: float) -> dict[str, Any]:
    calls = {"own": case.own, "eager": case.eager, **case.others}
    if case.compiled is not None:
        calls["compiled"] = case.compiled
    times, extra, failed = {}, {}, []
    for name, call in calls.items():
        try:
            times[name] = _time(call, device)
            extra[name] = _extra_bytes(call, device)
        except Exception as error:
            if name in ("own", "eager"):
                raise
            # A rival that fails is reported and skipped; it is not ours to fix.
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    row = {
        "op": case.op,
        "pass": case.pass_,
        "bytes": case.bytes,
        "milliseconds": times,
        "extra_bytes": extra,
        "fraction_of_copy": case.bytes / (times["own"]["median"] / 1e3) / copy,
    }
    return row | ({"failed": " " + "; ".join(failed)} if failed else {})
