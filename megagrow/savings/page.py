"""The figures and the page of a savings benchmark."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from megagrow.config.yamltext import write_yaml
from megagrow.errors import DataError
from megagrow.files import write_atomically
from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Marker, Series, Span
from megagrow.report.figure import figure
from megagrow.report.page import document, sheet
from megagrow.report.units import human
from megagrow.savings.campaign import Campaign
from megagrow.savings.config import SCRATCH
from megagrow.savings.curves import stable_curve
from megagrow.savings.table import origin, rows_table, sweeps_table, table, words

_LEAST_SHARE = 0.05  # of the largest budget: earlier losses are the initial fall from log V
_WORST = -1.0  # smaller savings are not drawn


def write(campaign: Campaign, result: Mapping[str, Any]) -> list[Path]:
    """Write report.html, savings.svg and losses.svg to the benchmark's directory.

    Raises:
        DataError: they cannot be written.
    """
    directory = Path(campaign.config.dir)
    figures = [savings_figure(result), losses_figure(result), _curves(campaign)]
    tables = {"Savings": rows_table(result), "Tuning": sweeps_table(result)}
    sheets = "".join(
        f"<h2>{name}</h2>"
        + sheet(
            name.lower(),
            rows[0],
            [[escape(cell) for cell in row] for row in rows[1:]],
            None,
            left=(),
        )
        for name, rows in tables.items()
    )
    called = [row for row in result["rows"] if row.get("called")]
    title = f"Savings: {len(called)} called" if called else "Savings: none is called"
    verdict = " ".join([*words(result), *origin(result)])
    body = (
        '<header><p class="eyebrow">megagrow savings benchmark</p>'
        f'<h1>{escape(title)}</h1><p class="sub">{escape(verdict)}</p></header>'
        f'<div class="charts two">{"".join(map(_shown, figures))}</div>'
        f"{sheets}"
        f"<details open><summary>In words</summary><pre>{escape(table(result))}</pre></details>"
        f"<details><summary>Configuration</summary><pre>"
        f"{escape(write_yaml(result['config']))}</pre></details>"
    )
    files = {"report.html": document(title="megagrow savings benchmark", body=body)}
    for name, drawn in zip(("savings.svg", "losses.svg"), figures, strict=False):
        if drawn:
            files[name] = drawn
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(directory / name, content.encode())
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written", found=error.strerror, fix="free space, or set dir"
        ) from error
    return [directory / name for name in files]


def _shown(drawn: str) -> str:
    """A figure in the page: an image, so that the ids of several do not meet."""
    if not drawn:
        return ""
    data = base64.b64encode(drawn.encode()).decode()
    return (
        '<figure class="tile"><img style="width: 100%" alt="as in the tables below" '
        f'src="data:image/svg+xml;base64,{data}"/></figure>'
    )


def savings_figure(result: Mapping[str, Any]) -> str:
    """SVG of the saving against tokens per parameter: variants, small models alone, bounds, zero.

    Like the others here, empty if there is nothing to draw.
    """
    places = [budget["tokens_per_parameter"] for budget in result["budgets"]]
    colours = iter(COLOURS * 4)
    series = [Series(SCRATCH, [(place, 0.0) for place in places], "main")]
    names = dict.fromkeys(row["name"] for row in result["rows"] if row["kind"] != SCRATCH)
    for name in names:
        points, spans = [], []
        for row in result["rows"]:
            saved = row["against_scratch"]["flops"] if row["name"] == name else None
            if saved is None or saved["mean"] is None or saved["bound"] or saved["mean"] < _WORST:
                continue
            points.append((row["tokens_per_parameter"], saved["mean"]))
            if saved["low"] is not None:
                spans.append(Span(row["tokens_per_parameter"], saved["low"], saved["high"]))
        series.append(Series(name, points, next(colours), marked=True, spans=spans))
    for small in result["smalls"]:
        points = [
            (place, one["saving"])
            for place, budget in zip(places, result["budgets"], strict=True)
            for one in result["bounds"]
            if one["small"] == small and one["budget"] == budget["flops"]
        ]
        if result["smalls"][small]["begins"]:
            series.append(Series(f"bound from {small}", points, next(colours)))
    values = [b for one in series for _, b in one.points]
    values += [
        max(end, _WORST) for one in series for span in one.spans for end in (span.low, span.high)
    ]
    return figure(
        title="Compute saved over tokens a parameter",
        note="FLOPs at equal validation loss after a completed decay, against the tuned baseline; "
        "mean over all seeds but the first, which chose, with 95 % intervals; bounds of one kind "
        "are in the table alone",
        x=axis(places, log=True, snap=True),
        y=axis(values, snap=True),
        x_label="tokens a parameter of the target, from scratch",
        series=series,
    )


def losses_figure(result: Mapping[str, Any]) -> str:
    """SVG of completed decays: mean loss over seeds against FLOPs, one curve per run."""
    by_name: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in result["runs"]:
        if run["loss"] is not None:
            own = by_name.setdefault(run["name"], {}).setdefault(run["budget"], [])
            own.append((run["flops"], run["loss"]))
    series = []
    for index, (name, budgets) in enumerate(by_name.items()):
        points = [
            (statistics.fmean(a for a, _ in own), statistics.fmean(b for _, b in own))
            for _, own in sorted(budgets.items())
        ]
        series.append(Series(name, points, COLOURS[index % len(COLOURS)], marked=True))
    return figure(
        title="Validation loss after the decay",
        note="mean over all seeds; each dot is of runs with a completed decay, all stages charged",
        x=axis([a for one in series for a, _ in one.points], log=True, snap=True, prefixes=True),
        y=axis([b for one in series for _, b in one.points], log=True, snap=True),
        x_label="compute (FLOPs, forward and backward)",
        series=series,
    )


def _curves(campaign: Campaign) -> str:
    """SVG of the first seed's stable phases: validation losses, or training if there are none."""
    config, largest = campaign.config, campaign.budgets[-1]
    least = _LEAST_SHARE * largest
    series: list[Series] = []
    markers: list[Marker] = []
    for name in (SCRATCH, *campaign.smalls, *config.variants):
        curve = stable_curve(campaign, name, largest)
        if curve is None:
            continue
        points = [point for point in curve.points if point[0] >= least]
        series.append(Series(name, points, COLOURS[len(series) % len(COLOURS)]))
        markers += [
            Marker(flops, name, f"{name} grows after {human(flops, 'FLOPs')}")
            for flops in curve.growths
        ]
    return figure(
        title="Loss in the stable phase",
        note="first seed, largest budget; scratch and small models: validation; grown runs: "
        "training, means over neighbouring steps",
        x=axis([a for one in series for a, _ in one.points], log=True, prefixes=True),
        y=axis([b for one in series for _, b in one.points], log=True, snap=True),
        x_label="compute (FLOPs, forward and backward)",
        series=series,
        markers=markers,
    )
