"""A chart as an SVG file, drawn by matplotlib; equal data gives equal bytes.

The report of a run has charts of its own (`megagrow.report.chart`), which adapt to the width of the
page and react to the pointer, and which need no library.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from megagrow.errors import ConfigError
from megagrow.report.axis import Axis
from megagrow.report.chart import Marker, Point, Series, Style

_COLOURS: dict[Style, str] = {
    "main": "#1c2330", "raw": "#2563c9", "dots": "#d2570c", "c1": "#2563c9", "c2": "#d2570c",
    "c3": "#1c7a45", "c4": "#7c3aab", "c5": "#b3123f", "c6": "#00798c", "c7": "#6b6f00",
}  # fmt: skip
_SOFT, _GRID = "#5d6778", "#e3e6eb"
_SIZE = (9.6, 5.2)  # inches, of 72 px
_NOTE_LETTERS = 125  # of a line
_LEGEND_COLUMNS = 4
_PADDING = 0.015  # of an axis, at each end
# Text stays text, in the reader's sans-serif font; element ids do not change from run to run.
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "megagrow", "font.family": "sans-serif",
    "text.parse_math": False,
}  # fmt: skip


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "figures need the package matplotlib, which is not installed",
            fix="pip install 'megagrow[benchmark]'",
        )


def figure(
    *,
    title: str,
    note: str,
    x: Axis,
    y: Axis,
    x_label: str,
    series: Sequence[Series],
    markers: Sequence[Marker] = (),
) -> str:
    """The text of an SVG file; empty if there is not one finite point.

    Args:
        note: under the title: quantity, unit, scale.
        markers: their titles are not shown.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = [one for one in series if any(map(_is_finite, one.points))]
    if not drawn:
        return ""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        sheet = Figure(figsize=_SIZE, layout="constrained")
        axes = sheet.add_subplot()
        for one in drawn:
            colour = _COLOURS[one.style]
            axes.plot(
                *zip(*one.points, strict=True),
                color=colour,
                label=one.name,
                linestyle="none" if one.style == "dots" else "-",
                marker="o" if one.marked or one.style == "dots" or len(one.points) == 1 else None,
                markersize=4,
            )
            for span in one.spans:
                axes.vlines(span.x, span.low, span.high, color=colour, alpha=0.6)
        for marker in markers:
            axes.axvline(marker.x, color=_COLOURS["c4"], linestyle=":", linewidth=1)
            axes.text(
                marker.x, 0.99, f"{marker.label} ", transform=axes.get_xaxis_transform(),
                rotation=90, ha="right", va="top", fontsize=8, color=_SOFT,
            )  # fmt: skip
        for along, scale, limits, ticks in (
            (x, axes.set_xscale, axes.set_xlim, axes.set_xticks),
            (y, axes.set_yscale, axes.set_ylim, axes.set_yticks),
        ):
            scale("log" if along.log else "linear")
            ticks([], minor=True)
            ticks(along.ticks, labels=along.labels)
            limits(*_padded(along))
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x_label, color=_SOFT)
        axes.set_title(textwrap.fill(note, _NOTE_LETTERS), loc="left", fontsize=9, color=_SOFT)
        sheet.suptitle(title, x=0.01, ha="left", fontsize=13)
        if len(drawn) > 1:
            columns = min(len(drawn), _LEGEND_COLUMNS)
            sheet.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        text = io.StringIO()
        sheet.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _padded(along: Axis) -> tuple[float, float]:
    """The limits of an axis, with room for the dots at its ends."""
    if along.log:
        factor = (along.high / along.low) ** _PADDING
        return along.low / factor, along.high * factor
    margin = (along.high - along.low) * _PADDING
    return along.low - margin, along.high + margin


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
