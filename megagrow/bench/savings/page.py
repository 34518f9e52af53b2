"""The table, the picture and the page of a savings benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megagrow.bench.savings.campaign import Campaign
from megagrow.report.units import human


def plan_text(campaign: Campaign) -> str:
    """What would be trained, and its FLOPs."""
    config = campaign.config
    lr = config.sweep.lr[0]
    phases = {
        "learning-rate sweep": campaign.sweep(),
        "first seed": campaign.first_seed(lr),
    }
    lines = [f"{config.dir}: budgets " + ", ".join(human(b, "FLOP") for b in config.budgets)]
    for phase, tasks in phases.items():
        lines.append(f"{phase}:")
        for one, branches in tasks:
            ends = ", ".join(f"{b.start} -> {b.end}" for b in branches)
            lines.append(f"  {one.name:<20} lr {one.lr:g} seed {one.seed}  decays {ends}")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    import json
    return json.dumps(result, indent=1)


def write(campaign: Campaign, result: Mapping[str, Any]) -> None:
    """The page of the benchmark, in its directory."""
