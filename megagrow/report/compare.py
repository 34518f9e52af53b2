"""Several runs on one page: their validation losses, what they cost, how their settings differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megagrow.config.yamltext import read_yaml
from megagrow.errors import DataError
from megagrow.report.axis import Axis, axis, progress_axis
from megagrow.report.chart import COLOURS, Marker, Point, Series, chart
from megagrow.report.figure import figure
from megagrow.report.log import iter_metrics
from megagrow.report.page import document, loss_text, sheet, status, value_cell, write_page
from megagrow.report.run import Run, summarize
from megagrow.report.units import duration, human, signed, whole

MOST = len(COLOURS)  # runs on a page, each in a colour of its own
_POINTS = 4_096  # validations of a run that are drawn
_FIX = "free space, or name another file"
# Settings on which a validation loss depends beside the model's quality, with those below them.
_COMPARABLE = ("data.path", "data.sources", "data.tokenizer", "data.validation", "data.documents",
               "train.validation_samples", "model.sequence", "model.vocab")  # fmt: skip
_FLOPS, _TOKENS = "compute (FLOPs, forward and backward)", "tokens seen"


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs.

    Attributes:
        name: a short name, no two alike.
        run: the summary of its log.
        settings: its configuration by dotted keys; empty if it has no config.yaml.
    """

    name: str
    run: Run
    settings: dict[str, Any]

    def curve(self, key: str) -> list[Point]:
        """Its validation losses over "flops" or "tokens"; a growth is a vertical step."""
        points = [(getattr(v, key), v.loss) for v in self.run.validations]
        for growth in self.run.growths:
            at = getattr(growth, key)
            points += [(at, growth.loss_before), (at, growth.loss_after)]
        # Stable: of the points of one moment, a validation comes before its growth.
        return sorted(points, key=lambda point: point[0])

    @property
    def loss(self) -> float:
        """The last finite validation loss; nan if there is none."""
        last = self.run.last_validation
        return last.loss if last is not None else math.nan

    def cost_of(self, loss: float) -> float:
        """The FLOPs at which its validation loss first was `loss`, interpolated; nan if never."""
        before: Point | None = None
        for at, now in self.curve("flops"):
            if now <= loss:
                if before is None or before[1] == now:
                    return at
                share = (before[1] - loss) / (before[1] - now)
                return before[0] + share * (at - before[0])
            before = (at, now)
        return math.nan


def open_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """Read the logs and configurations of runs.

    Raises:
        DataError: one is not a run directory or is damaged, one is given twice, or there are more
            than `MOST`.
        ConfigError: a config.yaml is not YAML.
    """
    if len(run_dirs) > MOST:
        raise DataError(
            f"{len(run_dirs)} runs cannot be told apart on one page",
            expected=f"at most {MOST}",
            fix="compare fewer at a time",
        )
    places = [path.resolve() for path in run_dirs]
    twice = {str(path) for path, place in zip(run_dirs, places, strict=True)
             if places.count(place) > 1}  # fmt: skip
    if twice:
        raise DataError(f"given twice: {', '.join(sorted(twice))}", fix="give each run once")
    names = _short_names(places)
    return [_open(path, name) for path, name in zip(run_dirs, names, strict=True)]


def _open(run_dir: Path, name: str) -> ComparedRun:
    log, config = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    if not log.is_file():
        raise DataError(
            f"{run_dir} has no run's log",
            found="no metrics.jsonl in it",
            expected="a directory that `megagrow train` wrote",
            fix="give the run's `run.dir`",
        )
    run = summarize(iter_metrics(log), most=_POINTS)
    settings: dict[str, Any] = {}
    if config.is_file():
        settings = dict(_dotted(read_yaml(config.read_bytes(), source=str(config))))
    return ComparedRun(name, run, settings)


def _short_names(places: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes for all names to differ."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _dotted(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by dotted keys, as they are given on a command line."""
    if isinstance(node, dict):
        parts = [(f"{key}.{name}" if key else str(name), value) for name, value in node.items()]
    elif isinstance(node, list) and any(isinstance(one, dict) for one in node):
        parts = [(f"{key}.{index}", value) for index, value in enumerate(node)]
    else:
        yield key, node
        return
    for name, value in parts:
        yield from _dotted(value, name)


def differences(runs: Sequence[ComparedRun]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same in all runs, `run.dir` apart, and each run's value.

    None stands for a setting that is null, and for one that a run does not have.
    """
    keys = dict.fromkeys(key for one in runs for key in one.settings if key != "run.dir")
    found = [(key, [one.settings.get(key) for one in runs]) for key in keys]
    return [(key, values) for key, values in found if any(v != values[0] for v in values)]


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write the page.

    Raises:
        DataError: it cannot be written.
    """
    write_page(path, render(runs), fix=_FIX)


def write_figure(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write validation loss over compute as an SVG file.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: no run has a validation yet, or the file cannot be written.
    """
    curves = [one.curve("flops") for one in runs]
    x, y, scale = _axes(curves)
    alone = len(runs) == 1
    text = figure(
        title=f"Validation loss of {runs[0].name}" if alone else "Validation loss",
        note=f"nats per token{scale}",
        x=x,
        y=y,
        x_label=_FLOPS,
        series=_series(runs, "flops", marked=True),
        markers=_growths(runs[0], "flops") if alone else (),
    )
    if not text:
        raise DataError("no validation to draw", fix="wait for the first one")
    write_page(path, text, fix=_FIX)


def render(runs: Sequence[ComparedRun]) -> str:
    """The page as HTML text."""
    names = " · ".join(escape(one.name) for one in runs)
    return document(
        title=f"{', '.join(one.name for one in runs)}: megagrow comparison",
        body=(
            f'<header><p class="eyebrow">megagrow comparison</p><h1>{names}</h1></header>'
            f"{_warning(runs)}<h2>Validation loss</h2>"
            f'<div class="charts two">{_chart(runs, "flops", "Loss over compute", _FLOPS)}'
            f"{_chart(runs, 'tokens', 'Loss over tokens', _TOKENS)}</div>"
            f"{_table(runs)}{_settings(runs)}"
        ),
    )


def _series(runs: Sequence[ComparedRun], key: str, *, marked: bool = False) -> list[Series]:
    return [
        Series(one.name, one.curve(key), colour, marked=marked)
        for one, colour in zip(runs, COLOURS, strict=False)
    ]


def _axes(curves: Sequence[Sequence[Point]]) -> tuple[Axis, Axis, str]:
    """Both axes, and a note on their scales."""
    x = progress_axis([x for curve in curves for x, _ in curve])
    # The losses of fresh weights would leave little height for all others.
    up = [y for curve in curves for x, y in curve if x > 0] or [y for c in curves for _, y in c]
    return x, axis(up, snap=True, count=7), "; compute on a log scale" if x.log else ""


def _chart(runs: Sequence[ComparedRun], key: str, title: str, label: str) -> str:
    curves = [one.curve(key) for one in runs]
    x, y, scale = _axes(curves)
    hover = [
        (at, f"{one.name}\nloss {loss_text(loss)}\n{human(at)}")
        for one, curve in zip(runs, curves, strict=True)
        for at, loss in curve
    ]
    return chart(
        title=title,
        note=f"nats per token{scale.replace('compute', label.split()[0])}; steps are growths",
        x=x,
        y=y,
        x_label=label,
        series=_series(runs, key),
        markers=[],
        hover=sorted(hover),
        height=340,
    )


def _growths(one: ComparedRun, key: str) -> list[Marker]:
    return [
        Marker(x=getattr(growth, key), label=f"{growth.operator} {growth.jump:+.3f}", title="")
        for growth in one.run.growths
    ]


def _warning(runs: Sequence[ComparedRun]) -> str:
    """A line on settings that make losses incomparable, if there are such differences."""
    keys = [key for key, _ in differences(runs) if key.startswith(_COMPARABLE)]
    bare = [one.name for one in runs if not one.settings]
    said = []
    if keys:
        said.append(
            f"The losses may not be comparable: {', '.join(keys)} differ, and a validation loss "
            "depends on the data, its tokenizer and the length of its samples."
        )
    said += [
        f"Of {whole(one.run.validations_each)} validations of {one.name} in a row one is used, and "
        "the last."
        for one in runs
        if one.run.validations_each > 1
    ]
    if bare:
        said.append(f"No config.yaml in {', '.join(bare)}: its settings are not compared.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in said)


def _table(runs: Sequence[ComparedRun]) -> str:
    first = runs[0]
    heads = ["run", "state", "parameters", "steps", "tokens", "FLOPs", "running time",
             "validation loss"]  # fmt: skip
    if len(runs) > 1:
        heads += [
            f"against {escape(first.name)}",
            f"FLOPs to the last loss of {escape(first.name)}",
        ]
    own, rows = first.cost_of(first.loss), []
    for one in runs:
        last, known = one.run.last_step, [s.parameters for s in one.run.stages]
        sizes = [size for size in known if math.isfinite(size)]
        cells = [
            escape(one.name),
            escape(status(one.run)[0]),
            " → ".join(value_cell(size, human) for size in dict.fromkeys(sizes)) or "–",
            value_cell(one.run.at, whole),
            value_cell(last.tokens if last else math.nan, human),
            value_cell(last.flops if last else math.nan, human),
            value_cell(one.run.seconds or math.nan, duration),
            value_cell(one.loss, loss_text),
        ]
        if len(runs) > 1:
            cost = one.cost_of(first.loss)
            share = f" ({signed(100 * (cost / own - 1))} %)" if own and one is not first else ""
            # Without a loss of the first run there is nothing to reach.
            never = math.isnan(cost) and not math.isnan(own)
            cells += [
                value_cell(one.loss - first.loss, signed),
                "not reached"
                if never
                else value_cell(cost, human) + ("" if math.isnan(cost) else escape(share)),
            ]
        rows.append(cells)
    note = (
        '<p class="note">The last column is where the validation loss of a run first was that of '
        f"the last validation of {escape(first.name)}, between validations by a straight line. One "
        "run of each says little: rates, decays and seeds move it by several per cent. "
        "<code>megagrow benchmark savings</code> measures a saving with its control.</p>"
    )
    return (
        "<h2>Runs</h2>"
        + sheet("runs", heads, rows, None, left=[0, 1])
        + (note if len(runs) > 1 else "")
    )


def _settings(runs: Sequence[ComparedRun]) -> str:
    if len(runs) == 1:
        return ""
    rows = [
        [f"<code>{escape(key)}</code>", *(escape("–" if v is None else str(v)) for v in values)]
        for key, values in differences(runs)
    ]
    if not rows:
        return "<h2>Settings that differ</h2><p>None but <code>run.dir</code>.</p>"
    heads = ["setting", *(escape(one.name) for one in runs)]
    every = range(len(runs) + 1)
    return "<h2>Settings that differ</h2>" + sheet("settings", heads, rows, None, left=every)
