"""Format the results of the growth benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megagrow.report.units import binary_bytes

_PARTS = ("close", "start", "transfer", "publish")
OVERHEAD_BYTES = 64 * 2**20  # allowed overhead besides staging: allocator, plan


def _above(rank: Mapping[str, Any]) -> int:
    """Peak memory beyond old state and new engine, while starting, moving or publishing."""
    return max(0, *(rank[f"{part}_above_bytes"] for part in ("start", "transfer", "publish")))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text."""
    head = (
        f"{'growth':<58}{'transfer':>10}{'x copy':>8}{'close':>8}{'start':>8}"
        f"{'publish':>9}{'whole':>9}{'x copy':>8}{'x files':>9}"
        f"{'crossed':>10}{'x least':>9}{'staging':>10}{'above':>10}"
    )
    lines = [head]
    for result in results:
        seconds, ranks = result["seconds"], result["ranks"]
        whole = sum(seconds[part] for part in _PARTS)
        live = seconds["transfer"] + seconds["publish"]
        files = (seconds["save"] + seconds["load"]) / live if "load" in seconds else None
        crossed, least = (sum(r[key] for r in ranks) for key in ("crossed_bytes", "least_bytes"))
        lines.append(
            f"{result['case']:<58}{seconds['transfer']:>8.3f} s"
            f"{seconds['transfer'] / seconds['copy']:>8.2f}"
            f"{seconds['close']:>8.2f}{seconds['start']:>8.2f}{seconds['publish']:>9.2f}"
            f"{whole:>7.2f} s"
            f"{whole / seconds['copy']:>8.1f}"
            + (f"{files:>9.1f}" if files else f"{'-':>9}")
            + f"{binary_bytes(crossed):>10}"
            + (f"{crossed / least:>9.3f}" if least else f"{'-':>9}")
            + f"{binary_bytes(max(r['staging_bytes'] for r in ranks)):>10}"
            + f"{binary_bytes(max(_above(r) for r in ranks)):>10}"
        )
    first = results[0]
    limit = int(first["staging_mib"] * 2**20) + OVERHEAD_BYTES
    worst = max(_above(r) for result in results for r in result["ranks"])
    verdict = "within" if worst <= limit else "ABOVE"
    lines += [
        "",
        f"{first['world']} processes, {first['threads']} threads each, {first['device']}; grown "
        "models of "
        + ", ".join(sorted({f"{r['parameters'] / 1e6:.0f} M" for r in results}))
        + " parameters, fp32",
        "x copy: of the time that all ranks take to copy as many bytes as their new state has",
        "whole: old engine down (close), new engine up (start: DeepSpeed's, and first touch of "
        "its memory), transfer, publish (all ranks gather the model's parameters, as every ZeRO "
        "step does); x files: save and load through "
        "a native checkpoint, over transfer and publish",
        "above: peak resident memory of any part over the old state and the new engine: "
        f"{verdict} the limit of {binary_bytes(limit)} "
        f"(staging and {binary_bytes(OVERHEAD_BYTES)})",
    ]
    return "\n".join(lines)
