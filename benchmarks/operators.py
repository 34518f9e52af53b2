"""Compare every growth operator under every state policy, on the same small model and data.

For each seed a small model is trained; every case continues from its one checkpoint: grown by an
operator under a policy, or not at all, for the same number of tokens.  They are compared with
models of the grown sizes trained from scratch on all the tokens.  All are ordinary
runs of `Trainer`, each with its own directory, and finished runs are not repeated.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint import step_path
from megagrow.config import Config
from megagrow.data.run_data import open_data
from megagrow.engine.comm import Comm
from megagrow.growth.registry import OPERATORS
from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Series
from megagrow.report.figure import figure as draw
from megagrow.report.log import read_metrics
from megagrow.report.run import Run, summarize
from megagrow.train.checkpoints import DIRECTORY
from megagrow.train.health.run_lock import holding_run
from megagrow.train.loop import Trainer
from megagrow.train.run_plan import plan_run, with_vocabulary

Result = dict[str, Any]
SCRATCH, SMALL = "from scratch", "not grown"

# 1.2 million parameters with a vocabulary of 4096; twice the width and four times the depth
# come to about the same, 3.9 and 3.5 million.
_MODEL: dict[str, Any] = {
    "family": "llama", "layers": 5, "hidden": 112, "heads": 7, "ffn": 304, "sequence": 64,
    "tie_embeddings": True,
}  # fmt: skip
_WIDE = {key: 2 * int(_MODEL[key]) for key in ("hidden", "heads", "ffn")}
_DEEP = {"layers": 4 * int(_MODEL["layers"])}
_GROWN = {"width": _WIDE, "depth": _DEEP}


@dataclass(frozen=True)
class Protocol:
    """What all cases share.

    Attributes:
        data: the prepared dataset.
        seeds: each sets data order and initial values.
        small_steps: steps of the small model before the growth.
        grown_steps: steps after it.
        batch: samples per step.
        lr: the learning rate, the same for all sizes, constant after a warm-up over a tenth of
            the small steps.
        rewarm, ramp, fit_steps: steps of re-warming, of the ramp, and of fitting maps, for the
            cases that have them.
    """

    data: Path
    seeds: tuple[int, ...] = (1, 2, 3)
    small_steps: int = 400
    grown_steps: int = 120
    batch: int = 8
    lr: float = 2e-3
    rewarm: int = 15
    ramp: int = 30
    fit_steps: int = 40


@dataclass(frozen=True)
class Case:
    """One run of the comparison.

    Attributes:
        axis: what grows: `width` or `depth`.
        operator: of the growth, or `SCRATCH` or `SMALL`.
        policy: of the growth.
        mup: whether, after it, a matrix's learning rate is divided by the growth of its inputs.
    """

    axis: str
    operator: str
    policy: str = ""
    mup: bool = False

    @property
    def name(self) -> str:
        """Its name in the table."""
        which = self.axis if self.operator == SCRATCH else self.policy
        return f"{self.operator} {which}{' mup' if self.mup else ''}".strip()

    @property
    def directory(self) -> str:
        """The run's directory, relative to its seed's."""
        return self.name.replace(" ", "-")

    @property
    def first(self) -> bool:
        """Whether it is a control, or an operator under its own default policy."""
        operator = OPERATORS.get(self.operator)
        return operator is None or self.policy == operator.policies[0]


def cases() -> list[Case]:
    """The controls, then every operator of width or depth with each of its policies."""
    found = [Case("width", SMALL), Case("width", SCRATCH), Case("depth", SCRATCH)]
    for operator in OPERATORS.values():
        for grown, sizes in _GROWN.items():
            if set(sizes) <= set(operator.sizes):
                found += [Case(grown, operator.name, policy) for policy in operator.policies]
                break
    return found + [Case("width", "width", policy, mup=True) for policy in ("sparkling", "kept")]


def train_all(comm: Comm, protocol: Protocol, work: Path, until: float | None) -> bool:
    """Train what is not finished yet; returns whether everything now is.

    In waves, each over all seeds (see `_wave`), so that comparable results exist even if time runs
    out.

    Args:
        comm: a job of one process.
        work: the runs' directory.
        until: time (seconds since 1970) after which no more runs are started.
    """
    plan = [(case, seed) for seed in protocol.seeds for case in cases()]
    for case, seed in sorted(plan, key=lambda one: _wave(one[0])):
        base, here = (work / f"seed-{seed}" / name for name in ("small", case.directory))
        start = None
        if case.operator != SCRATCH:
            start = step_path(base / DIRECTORY, protocol.small_steps)
            if not _train(comm, _config(protocol, seed, None, base), until=until):
                return False
        if not _train(comm, _config(protocol, seed, case, here), until=until, start=start):
            return False
    return True


def _wave(case: Case) -> int:
    """Operators under their first policies and all policies of one; the rest; the costliest."""
    if case.operator == SCRATCH:
        return 2
    return 0 if case.first or case.operator == "width" else 1


def _config(protocol: Protocol, seed: int, case: Case | None, run_dir: Path) -> Config:
    """The configuration of a run; without a case, of the small model's first part."""
    total = protocol.small_steps + protocol.grown_steps
    stages: list[dict[str, Any]] = [{"until": {"steps": protocol.small_steps}}]
    model = dict(_MODEL)
    if case is not None and case.operator in OPERATORS:
        operator = OPERATORS[case.operator]
        grow = {
            "operator": case.operator,
            "state_policy": case.policy,
            "target": _GROWN[case.axis],
            "mup": case.mup,
            "rewarm": protocol.rewarm,
            "ramp": protocol.ramp if operator.ramp else None,
            "fit_steps": protocol.fit_steps if operator.fitted else None,
        }
        stages.append({"grow": grow, "until": {"steps": total}})
    elif case is not None:
        stages = [{"until": {"steps": total}}]
    if case is not None and case.operator == SCRATCH:
        model |= _GROWN[case.axis]
    return Config.model_validate(
        {
            "run": {"dir": str(run_dir), "seed": seed},
            "model": model,
            "layout": {"zero": 0},
            "data": {"path": str(protocol.data)},
            "optimizer": {"lr": protocol.lr},
            "schedule": {"name": "constant", "warmup": protocol.small_steps // 10},
            "batch": {"global": protocol.batch, "micro": protocol.batch},
            "stages": stages,
            "train": {
                "validate_every": protocol.grown_steps // 4,
                "validation_samples": 32,
                "log_every": 1000,
                "tensorboard": False,
            },
            "checkpoint": {"every": 10**9, "keep": 1},
        }
    )


def _train(comm: Comm, config: Config, *, until: float | None, start: Path | None = None) -> bool:
    """Train one run unless it is finished or it is too late; returns whether it is finished.

    The checkpoints of a run that starts from another's are removed at its end: they are many.
    """
    run_dir = Path(config.run.dir)
    if finished(run_dir):
        return True
    if until is not None and time.time() > until:
        return False
    # An interrupted run starts over: it is short.
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    data = open_data(config)
    config = with_vocabulary(config, data.vocab_size)
    plan = plan_run(config, world=comm.world, vocabulary=data.vocab_size)
    with _spoken_into(run_dir / "log.txt"), holding_run(config, comm) as lock:
        resume = "auto" if start is None else str(start)
        trainer = Trainer(config=config, plan=plan, data=data, comm=comm, resume=resume, lock=lock)
        trainer.run()
        trainer.engine.close()
    if run_dir.name != "small":
        shutil.rmtree(run_dir / DIRECTORY)
    return True


@contextlib.contextmanager
def _spoken_into(path: Path) -> Iterator[None]:
    with (
        open(path, "a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield


def finished(run_dir: Path) -> bool:
    """Whether a run has reached its end; a run that was stopped early has not."""
    log = run_dir / "metrics.jsonl"
    return log.is_file() and _read(run_dir).complete


def _read(run_dir: Path) -> Run:
    return summarize(read_metrics(run_dir / "metrics.jsonl"))


# --- results ------------------------------------------------------------------------------


def results(protocol: Protocol, work: Path) -> list[Result]:
    """Finished results, case by case: validation losses by seed and step."""
    found = []
    for case in cases():
        runs = {
            seed: _read(work / f"seed-{seed}" / case.directory)
            for seed in protocol.seeds
            if finished(work / f"seed-{seed}" / case.directory)
        }
        if runs:
            found.append(_result(case, runs))
    return found


def _result(case: Case, runs: Mapping[int, Run]) -> Result:
    operator = OPERATORS.get(case.operator)
    last = next(iter(runs.values()))
    jumps = [run.growths[0].jump for run in runs.values() if run.growths]
    final = [run.final_validation for run in runs.values()]
    return {
        "name": case.name,
        "axis": case.axis,
        "operator": case.operator,
        "policy": case.policy,
        "mup": case.mup,
        "keeps": operator.keeps if operator else "",
        "parameters": last.stages[-1].parameters,
        "jump": statistics.fmean(jumps) if jumps else None,
        "final": statistics.fmean(final),
        "spread": statistics.stdev(final) if len(final) > 1 else None,
        "flops": last.validations[-1].flops,
        "seeds": {str(seed): _curve(run) for seed, run in runs.items()},
    }


def _curve(run: Run) -> list[Result]:
    """Validation losses, starting right after the growth if there is one."""
    grown = [{"step": g.step, "tokens": g.tokens, "loss": g.loss_after} for g in run.growths]
    return grown + [{"step": v.step, "tokens": v.tokens, "loss": v.loss} for v in run.validations]


def against(one: Result, other: Result) -> tuple[float, float] | None:
    """Mean difference of the final losses over the seeds that both have, and its standard error."""
    common = [seed for seed in one["seeds"] if seed in other["seeds"]]
    gaps = [one["seeds"][s][-1]["loss"] - other["seeds"][s][-1]["loss"] for s in common]
    if not gaps:
        return None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.fmean(gaps), error


def table(found: Sequence[Result]) -> str:
    """Cases by their difference from the small model that continues, in Markdown."""
    small = next((one for one in found if one["operator"] == SMALL), None)
    lines = [
        "| case | parameters | loss jumps by | final loss "
        "| difference to the small model, continued | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for grown in _GROWN:
        rows = []
        for one in found:
            if one["axis"] == grown:
                gap = against(one, small) if small is not None else None
                # Means over different seeds are not comparable, differences are.
                rows.append((one["final"] if gap is None else gap[0], one, gap))
        for _, one, gap in sorted(rows, key=lambda row: row[0]):
            lines.append(
                f"| {one['name']} | {one['parameters']:,.0f} "
                f"| {'' if one['jump'] is None else format(one['jump'], '+.3f')} "
                f"| {one['final']:.4f} | {_difference(gap)} | {len(one['seeds'])} |"
            )
    return "\n".join(lines)


def _difference(gap: tuple[float, float] | None) -> str:
    if gap is None:
        return ""
    return f"{gap[0]:+.4f}" + ("" if math.isnan(gap[1]) else f" ± {gap[1]:.4f}")


def figures(found: Sequence[Result]) -> dict[str, str]:
    """SVG files by name: each operator under its first policy, and every policy of `width`."""
    first = {case.name for case in cases() if case.first and not case.mup}
    grown = [one for one in found if one["name"] in first and one["operator"] != SCRATCH]
    chosen = {
        "width": ("Width growth, each operator under its own first policy",
                  [one for one in grown if one["axis"] == "width"]),
        "depth": ("Depth growth, each operator under its own first policy",
                  [one for one in grown if one["axis"] == "depth" or one["operator"] == SMALL]),
        "policies": ("The width operator under every state policy",
                     [one for one in found if one["operator"] in ("width", SMALL)
                      and not one["mup"]]),
    }  # fmt: skip
    return {name: _figure(title, group) for name, (title, group) in chosen.items() if group}


def _figure(title: str, group: Sequence[Result]) -> str:
    series = [
        Series(one["name"], _mean_curve(one), colour, marked=True)
        for one, colour in zip(group, COLOURS, strict=False)
    ]
    points = [point for one in series for point in one.points]
    return draw(
        title=title,
        note="validation loss, nats per token, mean over seeds",
        x=axis([x for x, _ in points], prefixes=True),
        y=axis([y for _, y in points], snap=True),
        x_label="tokens since the start of the small model",
        series=series,
    )


def _mean_curve(one: Result) -> list[tuple[float, float]]:
    by_seed = list(one["seeds"].values())
    points = zip(*by_seed, strict=True)
    return [(at[0]["tokens"], statistics.fmean(p["loss"] for p in at)) for at in points]
