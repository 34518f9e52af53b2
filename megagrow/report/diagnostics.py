"""The growth section of a report: diagnostics and mixing times."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Marker, Series, chart
from megagrow.report.run import Diagnosis, Run
from megagrow.report.units import human, number_text, whole

_HEIGHT = 190  # px
_X_LABEL = "tokens seen"
# For each chart: title, note, and the names in the log of the numbers that it shows.
_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Share of the new parameters",
        "in the squares of gradient and update, compared with their share in number",
        (
            ("gradient_share", "gradient"),
            ("update_share", "update"),
            ("parameter_share", "parameters"),
        ),
    ),
    (
        "Twins and dead units",
        "mean cosine between copies of a unit; share of units without gradient",
        (("twin_cosine", "cosine of twins"), ("dead_units", "dead units")),
    ),
    (
        "Participation ratio",
        "of the MLP's matrices: how many directions their rows use",
        (("participation", "participation ratio"),),
    ),
)


def diagnostics_section(run: Run, markers: Sequence[Marker]) -> str:
    """Charts of the diagnostics over tokens, as HTML; empty if there are none."""
    seen = run.diagnoses
    if not seen:
        return ""
    tokens = [*(one.tokens for one in seen), *(growth.tokens for growth in run.growths)]
    x = axis(tokens, zero=True, prefixes=True)
    charts = []
    for title, note, curves in _CHARTS:
        series = [
            Series(name, [(one.tokens, one.values.get(key, math.nan)) for one in seen], style, True)
            for (key, name), style in zip(curves, COLOURS, strict=False)
        ]
        values = [value for one in series for _, value in one.points]
        charts.append(
            chart(
                title=title,
                note=note,
                x=x,
                y=axis(values, zero=True, snap=True),
                series=series,
                hover=[(one.tokens, _text(one, curves)) for one in seen],
                x_label=_X_LABEL,
                markers=markers,
                height=_HEIGHT,
            )
        )
    return f'<h2>Growth diagnostics</h2><div class="charts three">{"".join(charts)}</div>'


def _text(one: Diagnosis, curves: Sequence[tuple[str, str]]) -> str:
    known = [f"{name} {number_text(one.values[key])}" for key, name in curves if key in one.values]
    return "\n".join([f"step {whole(one.step)}", *known, human(one.tokens, "tokens")])
