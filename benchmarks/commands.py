"""Run each benchmark of `launch/benchmark.py` from its options, and format the result."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases as wanted
from benchmarks import convert as converting
from benchmarks import dynamics as departing
from benchmarks import growth as growing
from benchmarks import growth_table
from benchmarks import kernels as fused
from benchmarks import mfu as utilisation
from benchmarks import operators as comparing
from benchmarks import recovery as recovering
from benchmarks import throughput as training
from megagrow.checkpoint.io.files import naming
from megagrow.config import LayoutConfig, ModelConfig
from megagrow.config.load import in_words, load_config
from megagrow.errors import CheckpointError, ConfigError
from megagrow.files import write_atomically
from megagrow.lock import holding_output
from megagrow.report.figure import require_matplotlib
from megagrow.savings import page as saved
from megagrow.savings.command import DISK
from megagrow.savings.command import savings as savings
from megagrow.savings.jobs import is_first, run_job, under_launcher
from megagrow.savings.machine import facts, write_json


def growth(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Live growth, one or several cases; returns (JSON data, text)."""
    world = options.ranks
    if options.pairs is not None:
        cases = wanted.standard_cases(world)
    else:
        old, new = (
            wanted.read_layout(text, world=world, option=option)
            for text, option in (
                (options.from_layout, "--from-layout"),
                (options.to_layout, "--to-layout"),
            )
        )
        cases = [
            wanted.Case(
                old,
                new,
                operator=options.operator,
                factor=options.factor,
                policy=options.policy,
            )
        ]
    scratch = {"auto": tempfile.gettempdir(), "none": None}.get(options.files, options.files)
    results = []
    for case in cases:
        model = wanted.model_for(
            options.parameters, operator=case.operator, factor=case.factor, family=options.family
        )
        wanted.check(case, model, world=world)
        results.append(run_job(world, growing.measure, case, model, options.staging_mib, scratch))
    text = growth_table.table(results) if is_first() else ""
    return {"benchmark": "growth", "results": results}, text


def throughput(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The training step, alone and in layouts; returns (JSON data, text)."""
    if under_launcher():
        raise ConfigError(
            "throughput: starts its own processes, since it compares different numbers of them",
            fix="start it with plain python",
        )
    model = _model(options)
    if options.batch % options.ranks:
        raise ConfigError(
            "--batch: cannot be shared out",
            found=f"--batch {options.batch}, --ranks {options.ranks}",
            expected=f"a multiple of {options.ranks}",
        )
    measured = {"batch": options.batch, "rounds": options.rounds, "steps": options.steps}
    alone = run_job(1, training.measure_alone, model, *measured.values(), tuple(training.RIVALS))
    result = {
        "benchmark": "throughput",
        "model": model.model_dump(by_alias=True),
        **measured,
        "alone": alone,
    }
    text = training.table(alone)
    if options.ranks > 1:
        layouts = _layouts(options.ranks)
        together = run_job(
            options.ranks, training.measure_layouts, model, *measured.values(), layouts
        )
        result["layouts"] = together
        text += "\n\n" + training.table(together)
    return result, text


def operators(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Every operator and policy compared; returns (JSON data, Markdown)."""
    if options.svg is not None:
        require_matplotlib()  # before anything is measured
    protocol = comparing.Protocol(options.data)
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    with holding_output(options.work), naming(options.work, "cannot be written or read", DISK):
        options.work.mkdir(parents=True, exist_ok=True)
        complete = run_job(1, comparing.train_all, protocol, options.work, until)
    found = comparing.results(protocol, options.work)
    result = {
        "benchmark": "operators",
        "protocol": asdict(protocol) | {"data": options.data.name},
        "complete": complete,
        "results": found,
    }
    if options.svg is not None:
        _write_figures(options.svg, comparing.figures(found))
    text = comparing.table(found)
    return (
        result,
        text if complete else text + "\n\nNot everything is trained: run it again to continue.",
    )


def convert(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Checkpoint conversion; returns (JSON data, text)."""
    if under_launcher():
        raise ConfigError(
            "convert: the conversion is one process", fix="start it with plain python"
        )
    result = converting.measure(options.parameters, options.directory, options.rounds)
    return result, converting.table(result)


def dynamics(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Grown runs compared with the small run; returns (JSON data, Markdown)."""
    if options.svg is not None:
        require_matplotlib()
    measured = {"factor": options.factor, "before": options.before, "steps": options.steps}
    found = [
        one for family in ("gpt2", "llama") for one in departing.measure(family=family, **measured)
    ]
    if options.svg is not None:
        _write_figures(options.svg, departing.figures(found))
    result = {
        "benchmark": "dynamics",
        **measured,
        "greatest_departure": departing.summary(found),
        "results": found,
    }
    return result, departing.table(found)


def figures(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures of results, drawn again from their JSON; returns (nothing, text).

    Raises:
        ConfigError: a file is no result, or one of a benchmark without figures.
    """
    drawers: dict[str, Callable[[Any], dict[str, str]]] = {
        "savings version 2": lambda result: {
            "": saved.savings_figure(result),
            "losses": saved.losses_figure(result),
        },
        "operators": lambda result: comparing.figures(result["results"]),
        "dynamics": lambda result: departing.figures(result["results"]),
    }
    written = []
    for path in options.results:
        try:
            result = dict(json.loads(path.read_bytes()))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: is no result of a benchmark: {error}") from None
        kind = result.get("benchmark")
        if kind == "savings":
            kind = f"savings version {result.get('version', 1)}"
        if kind not in drawers:
            raise ConfigError(
                f"{path}: no figures are drawn of this result",
                found=kind,
                expected=", ".join(drawers),
            )
        written += _write_figures(path.with_suffix(".svg"), drawers[kind](result))
    return {}, "\n".join(f"written: {path}" for path in written)


def _write_figures(path: Path, figures: dict[str, str]) -> list[Path]:
    """Write each figure to `NAME.svg` or `NAME_FIGURE.svg`; returns their paths."""
    written = []
    for name, drawn in figures.items():
        target = path.with_name(f"{path.stem}_{name}.svg") if name else path
        if drawn:
            write_atomically(target, drawn.encode())
            written.append(target)
    return written


def _model(options: argparse.Namespace) -> ModelConfig:
    names = ("layers", "hidden", "heads", "ffn", "sequence", "vocab")
    try:
        return ModelConfig.model_validate({name: getattr(options, name) for name in names})
    except ValueError as error:
        raise ConfigError(f"the model's options do not fit: {in_words(error)}") from error


def _layouts(world: int) -> list[LayoutConfig]:
    """Layouts that use all `world` processes for one kind of parallelism."""
    return [
        *(LayoutConfig(zero=zero) for zero in range(4)),
        LayoutConfig(tensor=world, zero=0),
        LayoutConfig(tensor=world, zero=0, sequence_parallel=True),
        LayoutConfig(pipeline=world, zero=0),
    ]


def recovery(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Recovery from a lost rank or host; returns (JSON data, Markdown)."""
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="megagrow-recovery-", dir=options.directory) as path:
        result = recovering.measure(
            fault=options.fault,
            parameters=options.parameters,
            repetitions=options.repetitions,
            silence=options.silence,
            backoff=options.backoff,
            directory=Path(path),
            copies=options.copies,
            against=options.against,
        )
    return result, recovering.table(result)


def faults(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Signals to a small run, and faults in every command that writes; returns (JSON data, text).

    Raises:
        CheckpointError: some outcome differs from the undisturbed one.
    """
    from benchmarks.faults import processes, shim, system, training

    signals = {signal.SIGKILL: options.kills, signal.SIGINT: options.interrupts,
               signal.SIGSTOP: options.stops}  # fmt: skip
    result: dict[str, Any] = {"benchmark": "faults"}
    texts = []

    def done(part: str, numbers: dict[str, Any], text: str) -> None:
        result[part] = {"where": facts(), **numbers}
        texts.append(text)
        if options.json is not None:  # the next part may take an hour
            write_json(options.json, result)

    asked = {"training": any(signals.values()), "commands": bool(options.strikes)}
    for part, numbers in _earlier(options.json).items():
        if asked.get(part) is False:
            result[part] = numbers
            texts.append(f"{part}: as {options.json} has it, not run again")
    load_config(options.config)  # now rather than after the first processes
    with contextlib.ExitStack() as held:
        scratch = held.enter_context(_scratch(options.keep))
        if any(signals.values()) or options.strikes:
            processes.begin(shim.build(scratch))
        if any(signals.values()):
            runs = training.Campaign(
                options.config, scratch / "runs", world=options.ranks, seed=options.seed
            )
            runs.run(signals, minutes=options.minutes)
            done("training", runs.result(), training.table(runs.result()))
        if options.strikes:
            every = system.System(
                options.config, scratch / "commands", seed=options.seed, only=options.only
            )
            every.run(strikes=options.strikes, minutes=options.minutes)
            done("commands", every.result(), system.table(every.result()))
    text = "\n\n".join(texts)
    if any(part["faults"] for part in result.values() if isinstance(part, dict)):
        raise CheckpointError("faults left their mark", found=text, expected="no faults")
    return result, text


def two_hosts(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Faults of jobs on two hosts; returns (JSON data, text).

    Raises:
        ConfigError: this machine allows no such hosts.
        CheckpointError: a job did not go on, or some outcome differs from the undisturbed one.
    """
    from benchmarks.faults import hosts
    from benchmarks.faults import two_hosts as campaigns

    if hosts.missing():
        raise ConfigError(f"two_hosts: {hosts.missing()}")
    earlier = _earlier(options.json)
    if earlier and earlier.get("benchmark") != "two_hosts":
        raise ConfigError(
            f"{options.json}: is the result of another benchmark",
            found=earlier.get("benchmark"),
            expected="two_hosts",
            fix="name another file with --json",
        )
    with _scratch(options.keep) as scratch:
        campaign = campaigns.TwoHosts(scratch, seed=options.seed, earlier=earlier)
        try:
            campaign.run(options.faults, minutes=options.minutes)
        finally:
            if options.json is not None:  # what a failure leaves counts as well
                write_json(options.json, campaign.result())
    text = campaigns.table(campaign.result())
    if campaign.differences:
        raise CheckpointError("faults left their mark", found=text, expected="no differences")
    return campaign.result(), text


def _earlier(path: Path | None) -> dict[str, Any]:
    """The result that a file has already; empty without one (ConfigError)."""
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is no result of a benchmark: {error}", fix="name another file with --json"
        ) from None


@contextlib.contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    """A directory for a campaign, which is deleted unless it is to be kept (ConfigError)."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="megagrow-faults-") as path:
            yield Path(path)
        return
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--keep {keep}: cannot be made",
            found=error.strerror,
            fix="name a directory that does not exist yet",
        ) from None
    yield keep


def kernels(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Every fused op on a GPU; returns (JSON data, text)."""
    result = fused.measure(dry_run=options.dry_run)
    return result, fused.table(result)


def mfu(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The training step with and without our kernels; returns (JSON data, text)."""
    if not options.dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "mfu: there is no CUDA device",
            fix="run this on a machine with a GPU, or add --dry-run",
        )
    result = run_job(1, utilisation.measure, options.dry_run)
    return {"benchmark": "mfu", **result}, utilisation.table(result)
