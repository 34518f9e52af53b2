"""One chart as inline SVG.

Horizontal positions are percentages and sizes are pixels, so that a chart adapts to the width of
the page while its text keeps its size: the same SVG is readable on a phone and on a wide screen.
Curves are in a nested SVG that stretches, with strokes that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from megagrow.report.axis import Axis

Point = tuple[float, float]

_GRID = 1000  # units of the stretched coordinate system, each way
_NARROWEST = 260  # px: the smallest plot width for which labels do not overlap
_LETTER = 7.4  # px: a generous mean width of a letter in a label
_ROW = 17  # px: height of one row of marker labels
_MOST_ROWS = 5
_BUCKETS = 400  # a curve is drawn with at most four points for each of these columns
_BANDS = 120  # columns that react to the pointer
_MOST_DOTS = 80


Style = Literal["raw", "main", "dots", "c1", "c2", "c3", "c4", "c5", "c6", "c7"]
COLOURS: tuple[Style, ...] = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")  # of several curves


@dataclass(frozen=True)
class Span:
    """An interval at `x`, drawn as a vertical line."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One curve: `style` is its CSS class, `name` its text in the legend.

    A point with a non-finite coordinate breaks the curve.
    """

    name: str
    points: Sequence[Point]
    style: Style
    marked: bool = False  # each point gets a dot
    spans: Sequence[Span] = ()  # intervals of points


@dataclass(frozen=True)
class Marker:
    """A vertical line at `x` with a label above the plot and a title for the pointer."""

    x: float
    label: str
    title: str


def chart(
    *,
    title: str,
    note: str,
    x: Axis,
    y: Axis,
    x_label: str,
    series: Sequence[Series],
    markers: Sequence[Marker] = (),
    hover: Sequence[tuple[float, str]] = (),
    height: int = 250,
) -> str:
    """A figure with title, legend and plot.

    Args:
        note: a line under the title: quantity, unit, scale.
        hover: (x, text) for the pointer; one text per column is used.
        height: of the plot alone, px.
    """
    drawn = [one for one in series if any(_is_finite(point) for point in one.points)]
    if not drawn:
        plot = '<p class="empty">Nothing was logged for this chart.</p>'
    else:
        plot = _plot(x, y, x_label, drawn, markers, hover, height, title)
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="note">{escape(note)}</p></figcaption>'
        f"{_legend(drawn, bool(markers))}{plot}</figure>"
    )


def _plot(
    x: Axis,
    y: Axis,
    x_label: str,
    series: Sequence[Series],
    markers: Sequence[Marker],
    hover: Sequence[tuple[float, str]],
    height: int,
    title: str,
) -> str:
    labels, rows = _place_labels(x, markers)
    top = rows * _ROW + 10
    bottom = top + height

    def across(value: float) -> str:
        return f"{100 * x.place(value):.2f}%"

    def down(value: float) -> str:
        return f"{bottom - height * y.place(value):.1f}"

    parts: list[str] = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = down(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="-8" y="{at}" dy="4" text-anchor="end">{label}</text>')
    for tick, label in zip(x.ticks, x.labels, strict=True):
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
        )
    parts.append(f'<line class="base" x1="0" x2="100%" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="axis" x="50%" y="{bottom + 40}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for marker, (_, row, _) in zip(markers, labels, strict=True):
        at, tip = across(marker.x), top - 6 - row * _ROW
        parts.append(f'<line class="marker" x1="{at}" x2="{at}" y1="{tip}" y2="{bottom}"/>')
    parts.append(
        f'<svg x="0" y="{top}" width="100%" height="{height}" '
        f'viewBox="0 0 {_GRID} {_GRID}" preserveAspectRatio="none">'
    )
    parts.extend(_curve(x, y, one) for one in series)
    parts.extend(_span(x, y, one.style, span) for one in series for span in one.spans)
    parts.append("</svg>")
    parts.extend(_bands(x, hover, top, height))
    for one in series:
        parts.extend(
            f'<circle class="dot {one.style}" cx="{across(a)}" cy="{down(b)}" r="3"/>'
            for a, b in _dots(x, y, one)
        )
    for marker, (anchor, row, text) in zip(markers, labels, strict=True):
        at = across(marker.x)
        full = f"<title>{escape(marker.title)}</title>"
        # A wide invisible line for the pointer; then the label, with a halo over other lines.
        parts.append(
            f'<line class="grip" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}">{full}</line>'
        )
        parts.append(
            f'<text class="label" x="{at}" y="{top - 11 - row * _ROW}" text-anchor="{anchor}">'
            f"{escape(text)}{full}</text>"
        )
    return (
        f'<svg class="plot" width="100%" height="{bottom + 48}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _curve(x: Axis, y: Axis, series: Series) -> str:
    """The points as line segments; an isolated point becomes a short dash."""
    pieces: list[str] = []
    for run in _finite_runs(series.points):
        placed = [(x.place(a) * _GRID, (1 - y.place(b)) * _GRID) for a, b in run]
        placed = [point for point in placed if _is_finite(point)]
        if len(placed) == 1:
            across, down = placed[0]
            placed = [(across - 4, down), (across + 4, down)]
        if placed:
            pieces.append(
                "M" + "L".join(f"{across:.1f},{down:.1f}" for across, down in _thin(placed))
            )
    return f'<path class="line {series.style}" d="{"".join(pieces)}"/>'


def _span(x: Axis, y: Axis, style: Style, span: Span) -> str:
    at = x.place(span.x) * _GRID
    low, high = ((1 - y.place(value)) * _GRID for value in (span.low, span.high))
    return f'<path class="line {style}" d="M{at:.1f},{low:.1f}L{at:.1f},{high:.1f}"/>'


def _dots(x: Axis, y: Axis, series: Series) -> list[Point]:
    """The points that get a dot: few enough to be distinguishable."""
    seen = [
        (a, b) for a, b in series.points if 0 <= x.place(a) <= 1 and -0.01 <= y.place(b) <= 1.01
    ]
    if series.style != "dots" and not series.marked and len(seen) > 1:
        return []  # the line is enough; an isolated point has none
    every = max(1, math.ceil(len(seen) / _MOST_DOTS))
    # The last one matters most to the reader: count from it.
    return seen[::-1][::every][::-1]


def _bands(x: Axis, hover: Sequence[tuple[float, str]], top: float, height: float) -> list[str]:
    texts: dict[int, str] = {}
    for value, text in hover:
        place = x.place(value)
        if 0 <= place <= 1:
            texts[min(int(place * _BANDS), _BANDS - 1)] = text
    width = 100 / _BANDS
    return [
        f'<rect class="band" x="{column * width:.2f}%" y="{top}" width="{width:.2f}%" '
        f'height="{height}"><title>{escape(text)}</title></rect>'
        for column, text in sorted(texts.items())
    ]


def _place_labels(x: Axis, markers: Sequence[Marker]) -> tuple[list[tuple[str, int, str]], int]:
    """(anchor, row, text) for each marker such that no labels overlap, and the number of rows.

    Labels do not overlap at the narrowest plot; since they are attached to their lines and the plot
    only gets wider, they do not overlap at any width.
    """
    for texts in ([m.label for m in markers], [f"#{n}" for n in range(1, len(markers) + 1)]):
        order = sorted(range(len(markers)), key=lambda i: markers[i].x)
        ends: list[float] = []  # end of the last label of each row, px
        placed: dict[int, tuple[str, int, str]] = {}
        for i in order:
            at = x.place(markers[i].x) * _NARROWEST
            half = len(texts[i]) * _LETTER / 2
            anchor, left = "middle", at - half
            if left < -40:
                anchor, left = "start", at
            elif at + half > _NARROWEST + 10:
                anchor, left = "end", at - 2 * half
            row = next((r for r, end in enumerate(ends) if left >= end + 10), len(ends))
            ends[row : row + 1] = [left + 2 * half]
            placed[i] = (anchor, row, texts[i])
        if len(ends) <= _MOST_ROWS:
            break
    return [placed[i] for i in range(len(markers))], len(ends)


def _legend(series: Sequence[Series], markers: bool) -> str:
    entries: list[tuple[str, str, bool]] = [
        (one.style, one.name, one.marked or one.style == "dots") for one in series
    ]
    if markers:
        entries.append(("marker", "growth", False))
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<li><svg class="key" width="24" height="12" aria-hidden="true">'
        f'<line class="line {style}" x1="1" x2="23" y1="6" y2="6"/>'
        f"{_KEY_DOT.format(style) if dots else ''}</svg>{escape(name)}</li>"
        for style, name, dots in entries
    )
    return f'<ul class="legend">{items}</ul>'


_KEY_DOT = '<circle class="dot {}" cx="12" cy="6" r="3"/>'


def _finite_runs(points: Sequence[Point]) -> Iterable[list[Point]]:
    run: list[Point] = []
    for point in points:
        if _is_finite(point):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _thin(points: list[Point]) -> list[Point]:
    """First, lowest, highest and last point of each column: the drawing does not change."""
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int(point[0] * _BUCKETS / _GRID), []).append(point)
    thinned: list[Point] = []
    for column in columns.values():
        if len(column) <= 4:
            thinned.extend(column)
            continue
        down = [point[1] for point in column]
        keep = {0, down.index(min(down)), down.index(max(down)), len(column) - 1}
        thinned.extend(column[i] for i in sorted(keep))
    return thinned


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
