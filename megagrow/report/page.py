"""The report page: one self-contained HTML file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megagrow import __version__
from megagrow.errors import DataError
from megagrow.files import write_atomically
from megagrow.report.curves import growth_markers, loss_charts, side_charts
from megagrow.report.diagnostics import diagnostics_section
from megagrow.report.log import iter_metrics
from megagrow.report.run import GrowthSummary, Run, StageSummary, summarize
from megagrow.report.style import STYLE
from megagrow.report.units import binary_bytes, duration, human, number_text, signed, whole

_SHAPE = ("family", "layers", "hidden", "heads")
_MORE_SHAPE = ("ffn", "sequence", "vocab")
# Characters that neither HTML nor XML allows in text, even escaped.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_MOST = 4_096  # maximum number of step groups and of validations on a page; more are merged
_NONE = '<span aria-label="not known">–</span>'


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from the run's log and configuration; returns its path.

    A run that has just begun, or not yet, gets a report that says so.

    Raises:
        DataError: `run_dir` is not a run directory, its log is damaged, or the
            report cannot be written.
    """
    run_dir = Path(run_dir)
    log, config = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    if not log.is_file() and not config.is_file():
        raise DataError(
            f"{run_dir} is not a run directory",
            found="neither metrics.jsonl nor config.yaml in it",
            expected="a directory that launch/pretrain.py wrote",
            fix="give the run's `run.dir`",
        )
    run = summarize(iter_metrics(log) if log.is_file() else (), most=_MOST)
    text = config.read_text("utf-8", errors="replace") if config.is_file() else None
    path = run_dir / "report.html"
    page = render(run, name=run_dir.resolve().name, config=text)
    write_page(path, page, fix=f"free space, then python launch/report.py {run_dir}")
    return path


def write_page(path: Path, text: str, *, fix: str) -> None:
    """Write a report, with its directory.

    Raises:
        DataError: it cannot be written; `fix` is what helps.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise DataError(
            f"cannot write the report {path}",
            found=error.strerror,
            expected="disk space and write permission",
            fix=fix,
        ) from error


def render(run: Run, *, name: str, config: str | None) -> str:
    """The page of `run` as HTML text; `config` is the text of its config.yaml."""
    charts = '<p class="empty">No step has been logged yet.</p>'
    if run.steps or run.validations:
        charts = (
            f'{_drawn_from(run)}<div class="charts two">{"".join(loss_charts(run))}</div>'
            f'<div class="charts three">{"".join(side_charts(run))}</div>'
        )
    diagnostics = diagnostics_section(run, growth_markers(run))
    return document(
        title=f"{name}: megagrow run report",
        body=f"{_header(run, name)}{_tiles(run)}<h2>Curves</h2>{charts}{_stage_table(run)}"
        f"{_growth_table(run)}{diagnostics}{_configuration(run, config)}",
    )


def _drawn_from(run: Run) -> str:
    """A note on what the curves leave out, if anything."""
    said = []
    if run.steps_each > 1:
        said.append(
            f"The curves are drawn from {whole(run.steps_counted)} steps: of every "
            f"{whole(run.steps_each)} neighbours those with the lowest and the highest loss and "
            "the largest gradient norm, and the means over all of them."
        )
    if run.validations_each > 1:
        said.append(f"Of {whole(run.validations_each)} validations in a row one is drawn.")
    if not said:
        return ""
    return f'<p class="note">{" ".join([*said, "Totals and tables count every one."])}</p>'


def document(*, title: str, body: str) -> str:
    """A complete page from a title (text) and a body (HTML)."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}"
        f"<footer>Made by megagrow {escape(__version__)}. Losses are in nats per token; FLOPs are "
        "counted from the model's shape, forward and backward, recomputation apart.</footer>"
        "</main></body></html>\n"
    )
    return _UNPRINTABLE.sub("\ufffd", page)


def _header(run: Run, name: str) -> str:
    said, good = status(run)
    chip = f'<span class="chip {"good" if good else "warn"}">{escape(said)}</span>'
    facts = [_many(run.at, "step")]
    facts.append(_many(len(run.growths), "growth"))
    if run.resumes:
        facts.append(f"resumed {'once' if run.resumes == 1 else f'{run.resumes} times'}")
    if run.first_not_finite is not None:
        facts.append(
            f"{_many(run.not_finite, 'step')} with a loss that is not a number, "
            f"the first is {whole(run.first_not_finite)}"
        )
    version = run.start.get("version", run.start.get("megagrow_version"))
    if version is not None:
        facts.append(f"megagrow {version}")
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f'<header><p class="eyebrow">megagrow run report</p><h1>{escape(name)}</h1>'
        f'<p class="sub">{chip}{spans}</p></header>'
    )


def status(run: Run) -> tuple[str, bool]:
    """The status of the run in words, and whether it has finished."""
    reason = run.end.get("reason")
    why = reason if isinstance(reason, str) and reason else None
    if run.complete:
        return (f"finished: {why}" if why else "finished"), True
    of = f"at {whole(run.at)}" + (
        f" of {whole(run.total_steps)} steps" if run.total_steps is not None else ""
    )
    if run.end:
        return f"stopped by {why} {of}" if why else f"stopped {of}", False
    return (f"not at its end: {of}" if run.steps_counted else "not begun"), False


def _validation_title(run: Run) -> str:
    """The label for the loss of the last validation."""
    last = run.last_validation
    if last is None:
        return "Validation loss"
    if run.complete and last.step == run.at:
        return "Final validation loss"
    return f"Validation loss of step {whole(last.step)}"


def _tiles(run: Run) -> str:
    last = run.last_step
    loss = run.last_validation.loss if run.last_validation is not None else math.nan
    known = [stage.parameters for stage in run.stages if math.isfinite(stage.parameters)]
    grown = f"from {human(known[0])}" if len(known) > 1 else ""
    tiles = [
        (
            _validation_title(run),
            value_cell(loss, loss_text),
            f"perplexity {number_text(math.exp(loss))}" if loss < 700 else "",
        ),
        ("Parameters", value_cell(known[-1] if known else math.nan, human), grown),
        ("Tokens", value_cell(last.tokens if last else math.nan, human), ""),
        ("Compute", value_cell(last.flops if last else math.nan, lambda v: human(v, "FLOPs")), ""),
        ("Wall time", value_cell(run.seconds or math.nan, duration), _mean_rate(run)),
        (
            "Goodput",
            value_cell(run.goodput, lambda share: f"{share:.0%}"),
            "of all time went into steps that were kept",
        ),
    ]
    items = "".join(
        f'<div class="tile"><dt>{title}</dt><dd><div class="value">{value}</div>'
        f'<div class="aside">{escape(aside)}</div></dd></div>'
        for title, value, aside in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _mean_rate(run: Run) -> str:
    flops = sum(stage.flops for stage in run.stages)
    return f"{human(flops / run.seconds, 'FLOP/s')} on average" if run.seconds and flops else ""


def _stage_table(run: Run) -> str:
    if not run.stages:
        return ""
    rows = [_stage_row(stage) for stage in run.stages]
    total = [
        "all",
        "",
        "",
        value_cell(sum(s.steps for s in run.stages), whole),
        value_cell(sum(s.tokens for s in run.stages), human),
        value_cell(sum(s.flops for s in run.stages), human),
        value_cell(run.seconds or math.nan, duration),
        "",
        value_cell(run.last_validation.loss if run.last_validation else math.nan, loss_text),
    ]
    heads = [
        "Stage",
        "Model and layout",
        "Parameters",
        "Steps",
        "Tokens",
        "FLOPs",
        "Time",
        "First validation loss",
        "Last validation loss",
    ]
    return "<h2>Growth stages</h2>" + sheet("stages", heads, rows, total, left=(1,))


def _stage_row(stage: StageSummary) -> list[str]:
    shape = escape(_shape(stage.model, _SHAPE))
    for more in (_shape(stage.model, _MORE_SHAPE), _layout(stage.layout)):
        shape += f"<small>{escape(more)}</small>" if more else ""
    return [
        str(stage.index),
        shape or _NONE,
        value_cell(stage.parameters, human),
        value_cell(stage.steps, whole),
        value_cell(stage.tokens, human),
        value_cell(stage.flops, human),
        value_cell(stage.seconds or math.nan, duration),
        value_cell(stage.first_validation, loss_text),
        value_cell(stage.last_validation, loss_text),
    ]


def _growth_table(run: Run) -> str:
    if not run.growths:
        return ""
    heads = [
        "#",
        "Operator",
        "After step",
        "Loss before",
        "Loss after",
        "Jump",
        "Parameters",
        "Time",
        "Bytes moved",
        "Peak staging",
    ]
    rows = [_growth_row(number, growth) for number, growth in enumerate(run.growths, start=1)]
    if any(growth.foretold for growth in run.growths):
        heads.append("Mixing time")
        for row, growth in zip(rows, run.growths, strict=True):
            row.append(_mixing(run, growth))
    return "<h2>Growths</h2>" + sheet("growths", heads, rows, None, left=(1,))


def _mixing(run: Run, growth: GrowthSummary) -> str:
    """The mixing time in tokens."""
    if growth.stage in run.mixing:
        return value_cell(run.mixing[growth.stage], lambda tokens: human(tokens, "tokens"))
    return "not in this run" if growth.foretold else _NONE


def _growth_row(number: int, growth: GrowthSummary) -> list[str]:
    policy = f"<small>state: {escape(growth.state_policy)}</small>" if growth.state_policy else ""
    return [
        str(number),
        escape(growth.operator) + policy,
        value_cell(growth.step, whole),
        value_cell(growth.loss_before, loss_text),
        value_cell(growth.loss_after, loss_text),
        value_cell(growth.jump, signed),
        f"{value_cell(growth.parameters_before, human)} → "
        f"{value_cell(growth.parameters_after, human)}",
        value_cell(growth.seconds, duration),
        value_cell(growth.bytes_moved, binary_bytes),
        value_cell(growth.peak_staging_bytes, binary_bytes),
    ]


def _configuration(run: Run, config: str | None) -> str:
    known = ("event", "time", "model", "layout", "growth_stage", "step")
    rest = {key: value for key, value in run.start.items() if key not in known}
    parts = ["<h2>Configuration</h2>"]
    shown = "This run directory has no config.yaml." if config is None else config
    parts.append(f"<details><summary>config.yaml</summary><pre>{escape(shown)}</pre></details>")
    if rest:
        lines = "\n".join(f"{key}: {value}" for key, value in rest.items())
        parts.append(
            f"<details><summary>At the start of the run</summary><pre>{escape(lines)}</pre>"
            "</details>"
        )
    return "".join(parts)


def _shape(model: dict[str, Any], keys: Sequence[str]) -> str:
    """'gpt2, 4 layers, 256 hidden, ...' for those `keys` that are in the log."""
    parts = []
    for key in keys:
        value = model.get(key)
        if value is not None:
            text = whole(value) if isinstance(value, int) else str(value)
            parts.append(text if key == "family" else f"{text} {key}")
    return ", ".join(parts)


def _layout(layout: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.items())


def sheet(
    name: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    total: Sequence[str] | None,
    *,
    left: Sequence[int],
) -> str:
    """A table whose cells are HTML; `left` lists the columns of text."""

    def row(cells: Sequence[str], tag: str) -> str:
        kind = ['<{0} class="left">{1}</{0}>', "<{0}>{1}</{0}>"]
        return "".join(kind[i not in left].format(tag, cell) for i, cell in enumerate(cells))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    foot = f"<tfoot><tr>{row(total, 'td')}</tr></tfoot>" if total is not None else ""
    return (
        f'<div class="sheet"><table id="{name}"><thead><tr>{row(heads, "th")}</tr></thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def loss_text(value: float) -> str:
    """The same number of decimals for all losses of a column."""
    return f"{value:.4f}" if math.isfinite(value) else number_text(value)


def value_cell(value: float, write: Callable[[float], str]) -> str:
    """A readable number, with the exact value for machines and on hover."""
    if math.isnan(value):
        return _NONE
    exact = f"{value:.0f}" if math.isfinite(value) and value == int(value) else repr(value)
    return f'<data value="{exact}" title="{exact}">{escape(write(value))}</data>'


def _many(count: int, what: str) -> str:
    plural = {"growth": "growths", "step": "steps"}
    return f"1 {what}" if count == 1 else f"{whole(count)} {plural[what]}"
