"""Collect a savings benchmark's result as plain data from the finished runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megagrow.savings.bound import Bound, Curve, bound
from megagrow.savings.campaign import Campaign
from megagrow.savings.config import SCRATCH, VERSION
from megagrow.savings.curves import all_curves, stable_curve
from megagrow.savings.known import SECTION, plain_point, section
from megagrow.savings.summary import Curves, compared, why_not
from megagrow.savings.sweep import Search, edges, search

Plain = dict[str, Any]


def collect(campaign: Campaign) -> Plain:
    """Collect everything that is known.

    Returns:
        `version`; `config`; `parameters` of the target (`megagrow.models.flops.matrix_parameters`);
        `budgets`; `smalls`, the small models with the variants that start with them; `sweeps`;
        `runs`, every run that counts or was used to choose; `bounds`; `rows`, one for each run at
        each budget, those of variants with `called` and `why_not`; `complete`; `from_files`, the
        runs not trained here; `known`, all end points and curves, for use on another machine.
    """
    config, members = campaign.config, campaign.members
    curves = _curves(campaign)
    sweeps = _sweeps(campaign)
    bounds = _bounds(campaign)
    variants = list(config.variants)
    starts = {name: members.start_of(name) for name in variants}
    return {
        "benchmark": "savings",
        "version": VERSION,
        "config": config.model_dump(mode="json", by_alias=True),
        "parameters": members.parameters,
        "budgets": [
            {"flops": budget, "tokens_per_parameter": members.tokens_per_parameter(budget)}
            for budget in campaign.budgets
        ],
        "smalls": {
            name: {
                "model": control.model,
                "begins": [one for one, start in starts.items() if start == name],
            }
            for name, control in members.smalls.items()
        },
        "sweeps": sweeps,
        "tokens_per_second": campaign.speeds,
        "runs": [
            {"name": name, "seed": seed, **plain_point(point)}
            for (name, seed), own in curves.items()
            for point in own
        ],
        "bounds": [
            {"small": small, "budget": budget, **asdict(found)}
            for (small, budget), found in bounds.items()
        ],
        "rows": _rows(campaign, curves, sweeps, bounds, starts),
        "complete": campaign.complete(),
        **_known(campaign),
    }


def _curves(campaign: Campaign) -> Curves:
    names = [SCRATCH, *campaign.smalls, *campaign.config.variants]
    found = {}
    for name in names:
        for seed in campaign.config.seeds:
            points = [campaign.point(name, seed, budget) for budget in campaign.budgets]
            own = [point for point in points if point is not None]
            if own:
                found[name, seed] = own
    return found


def _sweeps(campaign: Campaign) -> list[Plain]:
    found = []
    for name in (SCRATCH, *campaign.smalls):
        sweep, key = campaign.sweep_of(name)
        for budget in campaign.swept_at(name):
            tried: list[tuple[dict[str, Any], float]] = []

            def look(
                point: dict[str, Any], *, name: str = name, budget: float = budget,
                tried: list[tuple[dict[str, Any], float]] = tried,
            ) -> float | None:  # fmt: skip
                loss = campaign.loss(name, budget, point)
                if loss is not None and all(point != before for before, _ in tried):
                    tried.append((point, loss))
                return loss

            ended: Search = search(sweep, campaign.own(name), look)
            found.append(
                {
                    "name": name,
                    "budget": budget,
                    "tried": [
                        {"point": point, "loss": loss if math.isfinite(loss) else None}
                        for point, loss in tried
                    ],
                    "best": ended.best,
                    "edges": [] if ended.best is None else edges(sweep, ended.best, key=key),
                }
            )
    return found


def _bounds(campaign: Campaign) -> dict[tuple[str, float], Bound]:
    found = {}
    if not campaign.config.curve.points:
        return {}
    for small in campaign.smalls:
        for budget in campaign.budgets:
            ours, theirs = _stable(campaign, small, budget), _stable(campaign, SCRATCH, budget)
            one = bound(ours, theirs, budget=budget)
            if one is not None:
                found[small, budget] = one
    return found


def _stable(campaign: Campaign, name: str, budget: float) -> Curve:
    """Validation losses along the first seed's stable phase, at a budget's best settings."""
    found = stable_curve(campaign, name, budget)
    return [] if found is None else found.points


def _known(campaign: Campaign) -> Plain:
    """All known results, including those of files, so that overwriting a file loses nothing."""
    here, files, notes = campaign.end_points()
    by_key = {**campaign.known.points, **{one.key: one for one in (*files, *here)}}
    curves = {**campaign.known.curves, **{one.key: one for one in all_curves(campaign)}}
    return {
        "from_files": {
            "points": len(files),
            "of": len(files) + len(here),
            "versions": dict(sorted(Counter(one.version for one in files).items())),
            "notes": [*campaign.known.notes, *notes],
        },
        SECTION: section(by_key.values(), curves.values()),
    }


def _rows(
    campaign: Campaign,
    curves: Curves,
    sweeps: Sequence[Plain],
    bounds: dict[tuple[str, float], Bound],
    starts: dict[str, str],
) -> list[Plain]:
    rows = []
    seeds = campaign.config.seeds
    for budget in campaign.budgets:
        widen = [
            f"{text} ({one['name']})"
            for one in sweeps
            for text in one["edges"]
            if one["budget"] == campaign.sweep_budget(one["name"], budget)
        ]
        finalists = campaign.finalists(budget)
        for name in (SCRATCH, *campaign.smalls, *campaign.config.variants):
            losses = {
                str(seed): plain_point(point)["loss"]
                for seed in seeds
                for point in curves.get((name, seed), ())
                if point.budget == budget
            }
            row: Plain = {
                "budget": budget,
                "tokens_per_parameter": campaign.members.tokens_per_parameter(budget),
                "name": name,
                "kind": SCRATCH if name == SCRATCH
                else "small" if name in campaign.smalls else "variant",
                "settings": campaign.best(name if name in campaign.smalls else SCRATCH, budget),
                "losses": losses,
            }  # fmt: skip
            if not losses:
                continue
            if name != SCRATCH:
                against = compared(curves, name, SCRATCH, budget=budget, seeds=seeds)
                row["against_scratch"] = against.plain()
            if row["kind"] == "variant":
                smalls = {
                    small: compared(curves, name, small, budget=budget, seeds=seeds)
                    for small in campaign.smalls
                }
                limit = bounds.get((starts[name], budget))
                reasons = ["not among the finalists"]
                if name in finalists:
                    reasons = why_not(
                        against_scratch=against, against_smalls=smalls, edges=widen, bound=limit
                    )
                row |= {
                    "against_smalls": {small: one.plain() for small, one in smalls.items()},
                    "bound": None if limit is None else asdict(limit),
                    "finalist": name in finalists,
                    "called": not reasons,
                    "why_not": reasons,
                }
            rows.append(row)
    return rows
