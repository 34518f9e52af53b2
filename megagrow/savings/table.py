"""A savings benchmark as text: what would be trained, the tables, and the verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megagrow.report.units import human
from megagrow.savings.campaign import Campaign

NONE = "–"
_NOTES = 8  # maximum number of lines about files


def plan_text(campaign: Campaign) -> str:
    """What would be trained next, and at least how much follows."""
    config, members = campaign.config, campaign.members
    budgets = ", ".join(
        f"{human(budget, 'FLOP')} ({members.tokens_per_parameter(budget):.3g} tokens a parameter)"
        for budget in campaign.budgets
    )
    lines = [
        f"{config.dir}: a decay completed at {budgets}; a target of "
        f"{human(members.parameters)} parameters in matrix products",
    ]
    for task in campaign.missing():
        one = task.member
        ends = ", ".join(f"{b.start} to {b.end}" for b in task.wanted)
        point = ", ".join(f"{key} {value}" for key, value in one.point.items())
        lines.append(f"  {one.name}, seed {one.seed}, {point}: decays over steps {ends}")
    names = ", ".join(["scratch", *campaign.smalls, *config.variants])
    known = campaign.known
    if known.points:
        lines.append(f"{len(known.points)} end points are known from files")
    lines += known.notes
    lines.append(f"then, as soon as sweeps and the first seed say how: {names}, at every budget")
    lines.append(f"seeds: {config.seeds[0]} tunes and chooses, {len(config.seeds) - 1} measure")
    if config.tuning_seeds > 1:
        lines.append(f"sweeps: decided by the mean over the first {config.tuning_seeds} seeds")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """Markdown, for a terminal or a page."""
    parts = [markdown(rows_table(result)), markdown(sweeps_table(result)), *words(result)]
    parts += origin(result)
    if not result.get("complete", True):
        parts.append("Not finished: the same command continues from here.")
    return "\n\n".join(part for part in parts if part)


def words(result: Mapping[str, Any]) -> list[str]:
    """A sentence for every finalist at every budget."""
    found = []
    for row in result["rows"]:
        if not row.get("finalist"):
            continue
        where = f"{row['name']} at {row['tokens_per_parameter']:.3g} tokens a parameter"
        saved = row["against_scratch"]["flops"]
        if row["called"]:
            found.append(
                f"{where} saves {_percent(saved['mean'])} of the FLOPs "
                f"({_between(saved)}, {saved['seeds']} seeds)."
            )
        else:
            found.append(f"{where}: no saving is called: {'; '.join(row['why_not'])}.")
    return found


def origin(result: Mapping[str, Any]) -> list[str]:
    """What was not trained here, and notes about the files that contain it."""
    found = result.get("from_files", {})
    notes = list(found.get("notes", ()))
    said = []
    if found.get("points"):
        by = ", ".join(f"megagrow {version}: {n}" for version, n in found["versions"].items())
        said.append(
            f"{found['points']} of {found['of']} end points come from files ({by}), "
            "with the seconds that they took where they were trained."
        )
    if len(notes) > _NOTES:
        notes[_NOTES:] = [f"and {len(notes) - _NOTES} more such lines: from_files in the JSON"]
    return said + notes


def rows_table(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each run at each budget."""
    seeds = result["config"]["seeds"]
    first = str(seeds[0])
    rows = [["tokens a parameter", "FLOPs", "run", "loss", "less than scratch by", "FLOPs saved",
             "95 %", "seeds", f"seed {first}: loss", "saved", "tokens saved", "time saved",
             "bound", "a saving?"]]  # fmt: skip
    for row in result["rows"]:
        losses = [loss for seed, loss in row["losses"].items() if seed != first and loss]
        against = row.get("against_scratch")
        saved = against["flops"] if against else None
        chosen = against["by_seed"].get(first, {}).get("flops") if against else None
        rows.append(
            [
                f"{row['tokens_per_parameter']:.3g}",
                human(row["budget"]),
                row["name"],
                f"{statistics.fmean(losses):.4f}" if losses else NONE,
                _difference(against),
                _summary(saved),
                _between(saved),
                str(len(losses)),
                f"{row['losses'][first]:.4f}" if row["losses"].get(first) else NONE,
                NONE if chosen is None else f"{chosen['bound']} {chosen['saving']:.1%}".strip(),
                _summary(against["tokens"]) if against else NONE,
                _summary(against["seconds"]) if against else NONE,
                _bound(row.get("bound"), row["budget"]),
                _verdict(row),
            ]
        )
    return rows


def sweeps_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The results of the tuning."""
    target = {one["flops"]: one["tokens_per_parameter"] for one in result["budgets"]}
    rows = [["tuned", "tokens a parameter", "best", "tried (loss)", "edge"]]
    for sweep in result["sweeps"]:
        best = sweep["best"]
        tried = "; ".join(
            f"{' '.join(map(_value, one['point'].values()))}: "
            + ("diverged" if one["loss"] is None else f"{one['loss']:.4f}")
            for one in sweep["tried"]
        )
        said = NONE if best is None else ", ".join(f"{k} {v}" for k, v in best.items())
        rows.append([sweep["name"], f"{target[sweep['budget']]:.3g}", said, tried,
                     "; ".join(sweep["edges"]) or NONE])  # fmt: skip
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the first of them headings, as an aligned table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["kind"] != "variant":
        return NONE
    return "yes" if row["called"] else "no"


def _difference(against: Mapping[str, Any] | None) -> str:
    over = against["loss_difference"] if against else None
    if over is None:
        return NONE
    text = f"{-over['mean']:+.4f}"
    return text if over["low"] is None else f"{text} ± {(over['high'] - over['low']) / 2:.4f}"


def _summary(found: Mapping[str, Any] | None) -> str:
    if found is None or not found["seeds"]:
        return NONE
    text = f"{found['bound']} {'no mean' if found['mean'] is None else _percent(found['mean'])}"
    return text.strip() if found["sd"] is None else f"{text.strip()} (sd {found['sd']:.1%})"


def _between(found: Mapping[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return NONE
    return f"{found['low']:.1%} to {found['high']:.1%}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _bound(found: Mapping[str, Any] | None, budget: float) -> str:
    if found is None:
        return NONE
    sign = ">= " if found["open"] else ""
    return f"{sign}{found['saving']:.1%} at {found['at'] / budget:.0%}"
