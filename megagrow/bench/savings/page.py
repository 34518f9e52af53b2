"""The table, the picture and the page of a savings benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megagrow.bench.savings.campaign import Campaign
from megagrow.bench.savings.config import SCRATCH, SMALL
from megagrow.bench.savings.results import read_log
from megagrow.config.yamltext import write_yaml
from megagrow.errors import DataError
from megagrow.files import write_atomically
from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Marker, Series, chart, standalone
from megagrow.report.page import document, sheet
from megagrow.report.style import STYLE
from megagrow.report.units import duration, human

_NONE = "–"
_LEAST_SHARE = 0.05  # of the largest budget: what lies before it is the fall from log V


def plan_text(campaign: Campaign) -> str:
    """What would be trained, and its FLOPs."""
    config = campaign.config
    lr = config.sweep.lr[0]
    phases = {
        "learning-rate sweep of the baseline": campaign.sweep(),
        f"first seed, shown for lr {lr:g}": campaign.first_seed(lr),
    }
    budgets = ", ".join(human(budget, "FLOP") for budget in config.budgets)
    lines = [f"{config.dir}: a decay completed at {budgets}; then the small model alone, and seeds"]
    for phase, tasks in phases.items():
        lines.append(f"{phase}:")
        for one, branches in tasks:
            ends = ", ".join(f"{b.start} to {b.end}" for b in branches)
            lines.append(
                f"  {one.name:<20} lr {one.lr:g} seed {one.seed}: decays over steps {ends}"
            )
    return "\n".join(lines)


# --- text -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    sweep = result["sweep"]
    lines = [
        "baseline by learning rate: "
        + ", ".join(f"{rate}: {loss:.4f}" for rate, loss in sweep["loss"].items())
        + f" (validation loss at {human(sweep['budget'], 'FLOP')})",
    ]
    lines += ["", *_rows(_runs_table(result)), "", *_rows(_savings_table(result))]
    lines += _words(result)
    if not result.get("complete", True):
        lines.append("not finished: the same command goes on from here")
    return "\n".join(lines)


def _words(result: Mapping[str, Any]) -> list[str]:
    """What may be claimed, and what the controls say."""
    claim = result["claim"]
    lines = [f"no saving is claimed: {why}" for why in claim["why_not"]]
    if claim["saving"] is not None:
        lines.append(f"{claim['variant']} saves {_bounded(claim['bound'], claim['saving'])}")
    for name, control in result["controls"].items():
        variant = name.removeprefix(f"{SMALL}_")
        beaten = control["beaten_at_the_largest_budget"]
        if beaten is None:
            continue
        verdict = (
            "growth beats its small model alone at the largest budget"
            if beaten
            else "the small model alone is better at the largest budget: the target is too large "
            "for it"
        )
        lines.append(f"{variant}: {verdict}")
    return lines


def _runs_table(result: Mapping[str, Any]) -> list[list[str]]:
    budgets = result["config"]["budgets"]
    rows = [["run", "seed", *(f"loss at {human(budget, 'FLOP')}" for budget in budgets),
             "tokens", "time"]]  # fmt: skip
    for run in result["runs"]:
        at = {point["budget"]: point for point in run["points"]}
        last = run["points"][-1]
        rows.append(
            [
                run["name"],
                str(run["seed"]),
                *(f"{at[b]['loss']:.4f}" if b in at else _NONE for b in budgets),
                human(last["tokens"]),
                duration(last["seconds"]),
            ]
        )
    return rows


def _savings_table(result: Mapping[str, Any]) -> list[list[str]]:
    rows = [["saved at equal loss", "FLOPs", "95 %", "seeds", "tokens", "wall time", "at loss",
             "FLOPs, choosing seed"]]  # fmt: skip
    entries = list(result["variants"].items())
    for name, control in result["controls"].items():
        variant = name.removeprefix(f"{SMALL}_")
        entries.append((f"{name} alone", control["against_scratch"]))
        entries.append((f"{variant} against {name}", control["growth_against_it"]))
    for name, found in entries:
        if "flops" not in found:
            continue
        flops = found["flops"]
        first = next(iter(flops["by_seed"].values()))
        choosing = flops["by_seed"].get(str(flops["chosen_by"]))
        rows.append(
            [
                name,
                _share(flops),
                _NONE if flops["low"] is None else f"{flops['low']:.1%} to {flops['high']:.1%}",
                str(flops["seeds"]),
                _share(found.get("tokens")),
                _share(found.get("seconds")),
                f"{first['loss']:.4f}",
                _NONE if choosing is None else _bounded(choosing["bound"], choosing["saving"]),
            ]
        )
    return rows


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _NONE
    return _bounded(found["bound"], found["mean"])


def _bounded(bound: str, value: float | None) -> str:
    return f"{bound} {'no mean' if value is None else f'{value:.1%}'}".strip()


def _rows(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


# --- page -----------------------------------------------------------------------------------


def write(campaign: Campaign, result: Mapping[str, Any]) -> list[Path]:
    """report.html and savings.svg in the benchmark's directory.

    Raises:
        DataError: they cannot be written.
    """
    directory = Path(campaign.config.dir)
    figures = [_decayed(result), _curves(campaign, result)]
    tables = [_runs_table(result), _savings_table(result)]
    names = {"runs": "Runs", "savings": "Savings"}
    sheets = "".join(
        f"<h2>{names[name]}</h2>"
        + sheet(name, rows[0], [[escape(cell) for cell in row] for row in rows[1:]], None, left=())
        for name, rows in zip(names, tables, strict=True)
    )
    claim = result["claim"]
    title = "Savings: none is claimed"
    if claim["saving"] is not None:
        title = f"Compute saved at equal loss: {_bounded(claim['bound'], claim['saving'])}"
    verdict = "; ".join(_words(result))
    body = (
        '<header><p class="eyebrow">megagrow savings benchmark</p>'
        f'<h1>{escape(title)}</h1><p class="sub">{escape(verdict)}</p></header>'
        f'<div class="charts two">{"".join(figures)}</div>'
        f"{sheets}"
        f"<details open><summary>In words</summary><pre>{escape(table(result))}</pre></details>"
        f"<details><summary>Configuration</summary><pre>"
        f"{escape(write_yaml(result['config']))}</pre></details>"
    )
    files = {
        "report.html": document(title="megagrow savings benchmark", body=body),
        "savings.svg": standalone(figures[0], style=STYLE) if result["runs"] else "",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content:
                write_atomically(directory / name, content.encode())
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written", found=error.strerror, mend="free space, or set dir"
        ) from error
    return [directory / name for name, content in files.items() if content]


def _decayed(result: Mapping[str, Any]) -> str:
    """Completed decays: mean loss over seeds against FLOPs, a curve a variant."""
    by_name: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in result["runs"]:
        for point in run["points"]:
            own = by_name.setdefault(run["name"], {}).setdefault(point["budget"], [])
            own.append((point["flops"], point["loss"]))
    series = []
    for index, (name, budgets) in enumerate(by_name.items()):
        points = [
            tuple(sum(values) / len(values) for values in zip(*own, strict=True))
            for _, own in sorted(budgets.items())
        ]
        style = COLOURS[index % len(COLOURS)]
        series.append(Series(name, [(a, b) for a, b in points], style, marked=True))
    flops = [a for one in series for a, _ in one.points]
    losses = [b for one in series for _, b in one.points]
    return chart(
        title="Validation loss after the decay",
        note="mean over seeds; each dot is a run with a completed decay, all its stages charged",
        x=axis(flops, log=True, snap=True, prefixes=True),
        y=axis(losses, log=True, snap=True),
        x_label="compute (FLOPs, forward and backward)",
        series=series,
        height=340,
    )


def _curves(campaign: Campaign, result: Mapping[str, Any]) -> str:
    """Training loss of the stable runs of the first seed."""
    config, lr = campaign.config, result["sweep"]["best"]
    least = _LEAST_SHARE * config.budgets[-1]
    series: list[Series] = []
    markers: list[Marker] = []
    names = [SCRATCH, *config.variants, *result["controls"]]
    for name in names if lr is not None else []:
        one = campaign.member(name, seed=config.seeds[0], lr=lr)
        run = read_log(one.directory / "stable")
        if run is None:
            continue
        every = max(1, len(run.steps) // 150)
        blocks = [run.steps[i : i + every] for i in range(0, len(run.steps), every)]
        points = [
            (block[-1].flops, sum(step.loss for step in block) / len(block))
            for block in blocks
            if block[-1].flops >= least
        ]
        series.append(Series(name, points, COLOURS[len(series) % len(COLOURS)]))
        markers += [
            Marker(growth.flops, name, f"{name} grows after {human(growth.flops, 'FLOPs')}")
            for growth in run.growths
        ]
    every_loss = [loss for one in series for _, loss in one.points]
    return chart(
        title="Training loss of the stable phase",
        note="first seed, means over neighbouring steps",
        x=axis([a for one in series for a, _ in one.points], log=True, prefixes=True),
        y=axis(every_loss, log=True, snap=True),
        x_label="compute (FLOPs, forward and backward)",
        series=series,
        markers=markers,
        height=340,
    )
