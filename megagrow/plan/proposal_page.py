"""Render the planner's answer as text, and as a page with a plot."""

from __future__ import annotations

import os
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.errors import ConfigError, DataError
from megagrow.files import free_name, write_atomically
from megagrow.forecast.planner import PlannedStage
from megagrow.lock import holding_output
from megagrow.plan.proposal import Proposal
from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Marker, Series, chart
from megagrow.report.figure import figure
from megagrow.report.page import document, sheet
from megagrow.report.units import human

_POINTS = 120
_BEFORE = 8  # the plot begins at this fraction of the first stage's FLOPs
_ABOVE = 1.1  # and ends this much above the schedule's highest loss


def table(proposal: Proposal) -> str:
    """Render for a terminal."""
    law, schedule = proposal.law, proposal.schedule
    lines = [
        f"law: {law.name}, E {law.floor:.4g}, N_c {law.n_scale:.4g}, a_N {law.n_power:.4g}, "
        f"S_c {law.s_scale:.4g} {law.unit}, a_S {law.s_power:.4g}",
        "",
        f"{'stage':<7}{'layers':>7}{'hidden':>8}{'N':>10}{'loss at its end':>17}{'tokens':>12}"
        f"{'FLOPs':>12}",
    ]
    for index, stage in enumerate(schedule.stages):
        model = stage.size.model
        lines.append(
            f"{index:<7}{model.layers:>7}{model.hidden:>8}{human(stage.size.n):>10}"
            f"{stage.end_loss:>17.4f}{human(stage.end_tokens):>12}{human(stage.end_flops):>12}"
        )
    budget = schedule.stages[-1].end_flops
    size, loss = proposal.alone
    lines += [
        "",
        f"target from scratch, {human(budget, 'FLOPs')}: loss {proposal.scratch_loss:.4f}; "
        f"grown: {schedule.loss:.4f} (before any decay of the learning rate)",
        f"predicted saving at equal loss: {schedule.saving:.1%} "
        f"({proposal.low:.1%} to {proposal.high:.1%}: {proposal.interval})",
    ]
    if loss < schedule.loss:
        lines.append(
            f"but the law says that {human(size.n)} parameters alone ({size.model.layers} layers x "
            f"{size.model.hidden} hidden) reach {loss:.4f} with these FLOPs: the target is too "
            "large for the budget"
        )
    else:
        lines.append(
            f"best size from scratch with these FLOPs: {human(size.n)} parameters, loss {loss:.4f}"
        )
    return "\n".join(lines)


def page(proposal: Proposal, *, text: str, config: str) -> str:
    """HTML: the curves of all sizes with the schedule, the table, the configuration."""
    stages = proposal.schedule.stages
    drawn = chart(**_loss_over_compute(proposal), height=360)
    rows = [
        [
            str(index),
            f"{stage.size.model.layers} layers, {stage.size.model.hidden} hidden",
            human(stage.size.n),
            f"{stage.end_loss:.4f}",
            human(stage.end_tokens),
            human(stage.end_flops),
        ]
        for index, stage in enumerate(stages)
    ]
    heads = ["Stage", "Model", "Parameters", "Loss at its end", "Tokens", "FLOPs"]
    body = (
        '<header><p class="eyebrow">megagrow plan</p>'
        f"<h1>Predicted saving {proposal.schedule.saving:.1%}</h1>"
        f'<p class="sub">{proposal.low:.1%} to {proposal.high:.1%}: '
        f"{escape(proposal.interval)}</p></header>"
        f'<div class="charts">{drawn}</div><h2>Growth stages</h2>'
        f"{sheet('stages', heads, rows, None, left=(1,))}"
        f"<details open><summary>In words</summary><pre>{escape(text)}</pre></details>"
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
    )
    return document(title="megagrow plan", body=body)


def _loss_over_compute(proposal: Proposal) -> dict[str, Any]:
    """The chart of the schedule, as arguments of `chart` and of `figure`."""
    stages = proposal.schedule.stages
    budget = stages[-1].end_flops
    first = stages[0].end_flops
    sizes = [stage.size for stage in stages]
    flops = np.geomspace(first / _BEFORE, budget, _POINTS)
    curves = proposal.curves
    series = [
        Series(
            f"{human(size.n)} from scratch",
            [(float(c), curves.loss_at(size, c / size.flops_per_token)) for c in flops],
            COLOURS[index % len(COLOURS)],
        )
        for index, size in enumerate(sizes)
    ]
    grown = _path(proposal, stages)
    # Far above the schedule the curves are irrelevant to it.
    top = max(loss for _, loss in grown) * _ABOVE
    series = [
        Series(one.name, [point for point in one.points if point[1] <= top], one.style)
        for one in series
    ]
    series.append(Series("grown", grown, COLOURS[len(series) % len(COLOURS)]))
    every = [loss for one in series for _, loss in one.points]
    return {
        "title": "Loss over compute",
        "note": f"as the law {proposal.law.name} foretells it, both axes logarithmic",
        "x": axis(list(flops), log=True, prefixes=True),
        "y": axis(every, log=True, snap=True),
        "x_label": "FLOPs",
        "series": series,
        "markers": [
            Marker(
                stage.end_flops, f"to {human(after.size.n)}", f"grow at loss {stage.end_loss:.4f}"
            )
            for stage, after in pairwise(stages)
        ],
    }


def _path(proposal: Proposal, stages: tuple[PlannedStage, ...]) -> list[tuple[float, float]]:
    """(FLOPs, loss) along the schedule."""
    curves, points = proposal.curves, []
    flops, loss = 0.0, None
    for stage in stages:
        begun = 0.0 if loss is None else curves.tokens(stage.size, loss)
        low = max(flops, stages[0].end_flops / _BEFORE)
        for at in np.geomspace(low, stage.end_flops, _POINTS):
            tokens = begun + (at - flops) / stage.size.flops_per_token
            points.append((float(at), curves.loss_at(stage.size, tokens)))
        flops, loss = stage.end_flops, stage.end_loss
    return points


def write(directory: Path, proposal: Proposal, *, text: str, config: str) -> str:
    """Write config.yaml, plan.html and, with matplotlib, plan.svg; returns lines that say so.

    Raises:
        DataError: the directory cannot be written.
    """
    files = {"config.yaml": config, "plan.html": page(proposal, text=text, config=config)}
    left_out = ""
    try:
        files["plan.svg"] = figure(**_loss_over_compute(proposal))
    except ConfigError as error:
        left_out = f"\nno plan.svg: {error}"
    try:
        with holding_output(directory):
            directory.mkdir(parents=True, exist_ok=True)
            kept = _keep_edited(directory / "config.yaml", config)
            for name, content in files.items():
                write_atomically(directory / name, content.encode())
    except OSError as error:
        raise DataError(
            f"--output {directory}: cannot be written",
            found=error.strerror,
            fix="give another directory, or free space",
        ) from error
    return f"written: {directory}/" + f", {directory}/".join(files) + kept + left_out


def _keep_edited(path: Path, config: str) -> str:
    """Keep another configuration that is there under a free name; returns a line that says so."""
    if not path.is_file() or path.read_bytes() == config.encode():
        return ""
    other = free_name(path)
    os.rename(path, other)
    return f"\nkept: {other}, the {path.name} that was there"
