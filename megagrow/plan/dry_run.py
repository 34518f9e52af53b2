"""Dry run: a run's stages, sizes, memory and the cost of each growth, by arithmetic alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from megagrow.cluster.environment import ranks_here
from megagrow.config import Config
from megagrow.engine.deepspeed.config import deepspeed_config
from megagrow.engine.precision import on_gpu, precisions
from megagrow.errors import ConfigError
from megagrow.forecast.cost import STATE_BYTES, Received, received
from megagrow.forecast.memory import (
    DEVICE_PARTS,
    frozen_beyond_range,
    local_sizes,
    rank_memory,
    slot_elements,
)
from megagrow.growth.settings import growth_in_words
from megagrow.growth.training import training_in_words
from megagrow.report.units import human
from megagrow.state.precision import PRECISIONS
from megagrow.train.documents import documents_in_words
from megagrow.train.rates import rates_in_words, shape_in_words, start_in_words
from megagrow.train.ready import data_if_there, data_lines, ready, start_lines
from megagrow.train.run_plan import RunPlan, plan_run
from megagrow.transfer.state_map import Identity, StateMap

_RANKS_COUNTED = 64  # beyond this many, growth bytes are counted for a sample of ranks
_SAMPLE = 16
T = TypeVar("T")
_ROWS = 8  # rows shown per table; a longer one shows its first, greatest and last row
_FIX = {
    "parameters": "raise layout.tensor or layout.pipeline, or set layout.zero=3",
    "gradients": "raise layout.zero to 2 or 3, or raise layout.tensor or layout.pipeline",
    "optimizer": "raise layout.zero, start more processes, or set optimizer.offload=cpu",
    "activations": "lower batch.micro, set model.activation_checkpointing=full, or set "
    "layout.sequence_parallel=true with layout.tensor above 1",
    "buckets": "start more processes, or raise layout.tensor or layout.pipeline",
    "old state": "raise zero, tensor or pipeline in the layout of the stage before",
    "staging": "set growth.staging_mib lower",
}


def describe(config: Config, *, world: int, resume: str = "auto") -> str:
    """The text of a dry run on `world` processes.

    Raises:
        MegagrowError: anything that would stop the run before its first step.
    """
    found = ready(config, world=world, data_may_come=True)
    config, plan = found.config, found.plan
    lines = [f"{config.run.dir}: {world} processes, {plan.total_steps} steps"]
    for stage in plan.stages:
        lines += ["", *_stage_lines(config, plan, stage.index)]
    last = plan.stages[-1].plan
    rate = plan.learning_rate
    lines += [
        "",
        f"in all: {human(last.end_tokens, 'tokens')}, {human(last.end_flops, 'FLOP')}",
        f"learning rate: {rate.kind}, peak {rate.peak:g}"
        + "".join(f", {p.peak:g} from step {p.start}" for p in rate.phases)
        + f", warm-up {rate.warmup} steps"
        f"{'' if config.schedule.warmup is not None else ' (schedule.warmup is not given)'}, "
        f"decay {rate.decay_steps} steps"
        + "".join(f", {p.decay} steps before {p.end}" for p in rate.phases if p.decay)
        + "".join(f", re-warm {n} steps at {at}" for at, n in rate.rewarms)
        + "".join(f", set back to {to} at {at}" for at, to in rate.restarts),
    ]
    lines += [*data_lines(found), *start_lines(found, resume)]
    return "\n".join(lines)


def vocabulary(config: Config) -> int | None:
    """The dataset's vocabulary size; None if it does not exist yet and the model sets its own."""
    data = data_if_there(config, may_come=True)
    return None if data is None else data.vocab_size


def _stage_lines(config: Config, plan: RunPlan, index: int) -> list[str]:
    stage, catalog = plan.stages[index], plan.placement(index).catalog
    model, steps = stage.model, stage.plan
    fresh = index == 0 and config.init is None
    before = plan.stages[index - 1].catalog if index > 0 else None
    shape = f"{model.layers} layers x {model.hidden} hidden x {model.heads} heads x {model.ffn} ffn"
    lines = [
        f"stage {index}: {shape}, sequence {model.sequence}, vocabulary {model.vocabulary}",
        f"  parameters  {catalog.parameters:,}",
        f"  layout      {stage.layout}",
        f"  steps       {steps.start_step} to {steps.end_step}  "
        f"({human(steps.end_tokens - steps.start_tokens, 'tokens')}, "
        f"{human(steps.end_flops - steps.start_flops, 'FLOP')})",
        *(f"  init std    {line}" for line in start_in_words(catalog) if fresh),
        *(f"  rates       {line}" for line in shape_in_words(model, catalog, plan.optimizer)),
        *(
            f"  trains      {line}"
            for line in training_in_words(catalog, before=before, growth=stage.growth)
        ),
        *_precision_lines(config, plan, index),
        *_memory_lines(config, plan, index),
    ]
    if steps.sequence != model.sequence or steps.batch != config.batch:
        lines.append(
            f"  batch       {steps.batch.global_} samples of {steps.sequence} tokens, "
            f"micro-batch {steps.batch.micro}"
        )
    lines += [f"  rates       {line}" for line in rates_in_words(config, index)]
    lines += [f"  documents   {line}" for line in documents_in_words(config, model, index)]
    rule = config.stages[index].until.rule
    if rule is not None:
        known = [end for end in plan.planned if end.index == index]
        lines.append(
            f"  ends by     {rule}"
            + (f" (loss {known[0].loss:.4f} by the law)" if known else "; the steps are its latest")
        )
    if stage.growth is not None and stage.grow is not None:
        lines.insert(
            1,
            f"  grows by    {growth_in_words(stage.grow)}, state policy {stage.growth.policy.name}",
        )
        lines[2:2] = [
            f"              {caveat}"
            for caveat in stage.growth.caveats(
                grad_clip=stage.optimizer.grad_clip, dropout=stage.model.dropout
            )
        ]
    if index > 0:
        lines += _moves_lines(config, plan, index)
    return lines


def _precision_lines(config: Config, plan: RunPlan, index: int) -> list[str]:
    stage = plan.stages[index]
    settings = deepspeed_config(stage.settings(config), stage.layout, parameters=1)
    formats = precisions(settings, optimizer=config.optimizer.kind, gpu=on_gpu())
    lines = [f"  precision   {formats}"]
    if formats.caveat is not None:
        lines.append(f"              which {formats.caveat}")
    return lines


# --- memory ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """What the fullest rank of a pipeline stage holds at some point of the run.

    Attributes:
        pipe: the pipeline stage.
        when: the point, in words.
        parts: bytes on the device, by category.
        host: bytes in host memory, with offload.
        early: the part of the gradient bytes already allocated before the first step.
    """

    pipe: int
    when: str
    parts: dict[str, int]
    host: int
    early: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def training_peaks(config: Config, plan: RunPlan, index: int) -> list[Peak]:
    """Peak memory during training, by pipeline stage."""
    stage, placement = plan.stages[index], plan.placement(index)
    config = stage.settings(config)
    peaks = []
    for pipe in range(stage.layout.pipeline):
        numel = sum(map(sum, local_sizes(placement, pipe, frozen=False)))
        settings = deepspeed_config(config, stage.layout, parameters=numel)
        formats = precisions(settings, optimizer=config.optimizer.kind, gpu=on_gpu())
        memory = rank_memory(
            config,
            stage.seen,
            placement,
            pipe=pipe,
            bucket=settings["zero_optimization"]["reduce_bucket_size"],
            accumulation=formats.micro_batches,
            summed=PRECISIONS[formats.accumulation].bytes,
            reduced=PRECISIONS[formats.reduction].bytes,
            sequence_parallel=stage.plan.layout.sequence_parallel,
        )
        parts = {part: getattr(memory, part) for part in DEVICE_PARTS}
        peaks.append(Peak(pipe, "in training", parts, memory.host, memory.early))
    return peaks


def growth_peaks(config: Config, plan: RunPlan, index: int) -> list[Peak]:
    """Peak memory during the growth into a stage, by pipeline stage: old state and new engine."""
    before, after = plan.stages[index - 1].layout, plan.stages[index].layout
    placement = plan.placement(index - 1)
    old = [
        STATE_BYTES * slot_elements(placement, pipe, plan.slots)
        + frozen_beyond_range(placement, pipe, config.precision.dtype)
        for pipe in range(before.pipeline)
    ]
    staging = config.growth.staging_bytes
    peaks = []
    for peak in training_peaks(config, plan, index):
        first = after.rank(pipe=peak.pipe, data=0, tensor=0)
        ranks = range(first, first + after.data * after.tensor)
        held = max(old[before.coordinates(rank).pipe] for rank in ranks)
        offloaded = config.optimizer.offload == "cpu"
        parts = {
            "old state": 0 if offloaded else held,
            "parameters": peak.parts["parameters"],
            "gradients": peak.early,
            "optimizer": peak.parts["optimizer"],
            "staging": staging,
        }
        host = peak.host + (held if offloaded else 0)
        peaks.append(Peak(peak.pipe, "while it grows into this stage", parts, host))
    return peaks


def check_memory(config: Config, *, world: int, memory: str | None) -> str:
    """Check that every rank's share fits its device; returns one line that says so.

    Args:
        config: the run.
        world: number of processes.
        memory: of one device, such as ``80GB``; None uses this machine's, and checks nothing
            if the job has more processes than its cores.

    Raises:
        ConfigError: it does not fit; names the stage, the largest part and what to change.
    """
    plan = plan_run(config, world=world, vocabulary=vocabulary(config))
    if memory is not None:
        limit, given, on_host = read_memory(memory), "--memory", False
    else:
        limit, given, on_host = _own_memory(world)
    checked = memory is not None or not on_host or world <= _own_ranks(world)
    most = 0
    for stage in plan.stages:
        peaks = training_peaks(config, plan, stage.index)
        if stage.index > 0:
            peaks += growth_peaks(config, plan, stage.index)
        for peak in peaks:
            parts = {**peak.parts, "optimizer": peak.parts["optimizer"] + peak.host * on_host}
            total = sum(parts.values())
            most = max(most, total)
            if checked and total > limit:
                part, size = max(parts.items(), key=lambda item: item[1])
                pipe = f", pipeline stage {peak.pipe}" if stage.layout.pipeline > 1 else ""
                raise ConfigError(
                    f"stages[{stage.index}]{pipe}: does not fit into memory {peak.when}",
                    found=f"{human(total, 'B')} a rank, most of it {part} ({human(size, 'B')})",
                    expected=f"at most {human(limit, 'B')}: {given}",
                    fix=_FIX[part]
                    + ("" if memory else "; for other machines say --memory, such as 80GB"),
                )
    if not checked:
        return (
            f"memory: at most {human(most, 'B')} a rank; whether that fits was not checked, since "
            f"{world} processes are for other machines than this: say --memory, such as 80GB"
        )
    return f"memory: at most {human(most, 'B')} a rank, fits into {human(limit, 'B')} ({given})"


_MOST_MEMORY = 2**60


def read_memory(text: str) -> int:
    """Convert ``80GB``, ``80g`` or ``512MiB`` to bytes.

    Raises:
        ConfigError: it is not an amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I)?)?B?\s*", text.upper())
    power = "KMGT".index(found[2]) + 1 if found and found[2] else 0
    size = float(found[1]) * (1024 if found[3] else 1000) ** power if found else 0.0
    if not 1.0 <= size <= _MOST_MEMORY:
        raise ConfigError(
            "--memory: is not an amount of memory",
            found=text,
            expected="a number with a unit, such as 80GB or 64GiB; at most 1 EiB",
        )
    return int(size)


def _own_memory(world: int) -> tuple[int, str, bool]:
    """(bytes available to a rank on this machine, description, whether it is host memory)."""
    if on_gpu():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's GPU", False
    ranks = _own_ranks(world)
    share = psutil.virtual_memory().total // ranks
    return share, f"this machine's memory, shared by {ranks} ranks", True


def _own_ranks(world: int) -> int:
    """How many ranks of a CPU job are on this machine."""
    return ranks_here(os.environ) or min(world, os.cpu_count() or 1)


def _memory_lines(config: Config, plan: RunPlan, index: int) -> list[str]:
    training = training_peaks(config, plan, index)
    growing = growth_peaks(config, plan, index) if index > 0 else []
    rows = [
        [
            f"pipeline stage {peak.pipe}" if len(training) > 1 else "every rank",
            *(human(size, "B") for size in peak.parts.values()),
            human(peak.total, "B"),
            *([human(growing[peak.pipe].total, "B")] if growing else []),
            *([human(peak.host, "B")] if peak.host else []),
        ]
        for peak in _some(training, key=lambda peak: peak.total)
    ]
    head = ["", *DEVICE_PARTS, "in all"]
    head += ["while it grows"] * bool(growing) + ["in host memory"] * bool(training[0].host)
    return ["  memory      of the fullest rank", *_table(head, rows)]


# --- growth ---------------------------------------------------------------------------------


def bytes_moved(plan: RunPlan, index: int, *, ranks: Sequence[int]) -> tuple[int, int]:
    """Bytes of state that the growth into a stage copies to some ranks.

    Returns:
        (all bytes copied, those sent between ranks).
    """
    counts = moves(plan, index, ranks=ranks).values()
    return sum(c.local + c.foreign for c in counts), sum(c.crossed for c in counts)


def moves(plan: RunPlan, index: int, *, ranks: Iterable[int]) -> dict[int, Received]:
    """How some ranks receive their state in the growth into a stage."""
    stage, old, new = plan.stages[index], plan.placement(index - 1), plan.placement(index)
    state_map: StateMap = stage.growth or Identity(new.catalog, old.catalog)
    return {rank: received(state_map, old, new, slots=plan.slots, rank=rank) for rank in ranks}


def sample_ranks(world: int) -> list[int]:
    """All ranks of a small world; of a large one an evenly spread sample, with both ends."""
    if world <= _RANKS_COUNTED:
        return list(range(world))
    # An odd stride reaches every coordinate of the grid.
    return sorted({(world - 1) * i // (_SAMPLE - 1) for i in range(_SAMPLE)})


def _moves_lines(config: Config, plan: RunPlan, index: int) -> list[str]:
    world = plan.stages[index].layout.world
    staging = human(config.growth.staging_bytes, "B")
    counts = moves(plan, index, ranks=sample_ranks(world))
    exact, scale = len(counts) == world, world / len(counts)
    crossed = sum(count.crossed for count in counts.values()) * scale
    copied = sum(count.local + count.foreign for count in counts.values()) * scale
    about = "" if exact else f", from a sample of {len(counts)} ranks"
    lines = [
        f"  moves       {human(copied, 'B')} in all, {human(crossed, 'B')} between ranks; "
        f"staging at most {staging} a rank{about}"
    ]
    sent = {rank: sum(count.by_holder.get(rank, 0) for count in counts.values()) for rank in counts}
    rows = [
        [
            f"rank {rank}",
            human(count.local, "B"),
            human(count.foreign, "B"),
            human(count.crossed, "B"),
            human(count.least, "B"),
            *([human(sent[rank], "B")] if exact else []),
        ]
        for rank, count in _some(list(counts.items()), key=lambda item: item[1].crossed)
    ]
    head = ["", "moved locally", "from others", "received", "at least", *["sent"] * exact]
    return lines + _table(head, rows)


# --- tables ---------------------------------------------------------------------------------


def _some(rows: list[T], *, key: Callable[[T], int]) -> list[T]:
    """All rows of a short table, else the first, the greatest and the last."""
    if len(rows) <= _ROWS:
        return rows
    top = max(range(len(rows)), key=lambda i: key(rows[i]))
    return [rows[i] for i in sorted({0, top, len(rows) - 1})]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "    " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (head, *rows)
    ]
