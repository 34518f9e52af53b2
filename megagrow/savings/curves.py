"""Losses along stable runs: from local runs, else from result files."""

from __future__ import annotations

import math
import statistics

from megagrow.savings.campaign import Campaign
from megagrow.savings.config import SCRATCH
from megagrow.savings.known import CurveKey, StableCurve
from megagrow.savings.members import Member
from megagrow.savings.results import made_by, read_log

_MEANS = 150  # points per curve of training losses; at most half as many again
_DIGITS = 5  # of each mean: enough for a figure


def stable_curve(campaign: Campaign, name: str, budget: float) -> StableCurve | None:
    """The curve of the first seed's stable phase, at a budget's best settings.

    Validation losses for the baseline and the small models; training losses for variants, and
    wherever there are no validations along the way.  The local run takes precedence once it has
    come as far as the known one, since it may have been restarted for a smaller budget.
    """
    one = campaign.member(name, campaign.config.seeds[0], budget)
    if one is None:
        return None
    watched = campaign.config.curve
    if name in campaign.config.variants or not watched.points:
        key = CurveKey(one.run, campaign.data, "training", None)
    else:
        key = CurveKey(one.run, campaign.data, "validation", watched.samples)
    here, known = _of_run(one, key), campaign.known.curves.get(key)
    if here is None or (known is not None and known.reach > here.reach):
        return known
    return here


def all_curves(campaign: Campaign) -> list[StableCurve]:
    """The curves used for the bound and the figures."""
    budgets = campaign.budgets
    found = [
        stable_curve(campaign, name, budget)
        for name in (SCRATCH, *campaign.smalls, *campaign.config.variants)
        for budget in (budgets[-1:] if name in campaign.config.variants else budgets)
    ]
    return [one for one in found if one is not None]


def _of_run(one: Member, key: CurveKey) -> StableCurve | None:
    directory = one.directory / "stable"
    run = read_log(directory)
    if run is None:
        return None
    points = [(found.flops, found.loss) for found in run.validations if found.step > 0]
    if key.kind == "training":
        every = max(1, len(run.steps) // _MEANS)
        blocks = [run.steps[i : i + every] for i in range(0, len(run.steps), every)]
        points = [
            (block[-1].flops, _short(statistics.fmean(step.loss for step in block)))
            for block in blocks
        ]
    sound = [(flops, loss) for flops, loss in points if math.isfinite(loss) and loss > 0]
    growths = [growth.flops for growth in run.growths]
    return StableCurve(key, sound, growths, made_by(directory))


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
