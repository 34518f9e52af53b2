"""What a run would be: stages, sizes, memory and the cost of each growth, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagrow.config import Config
from megagrow.data.dataset import MANIFEST, open_dataset
from megagrow.report.units import human
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.plan import plan_receives
from megagrow.state.statemap import Identity
from megagrow.train.plan import RunPlan, plan_run

_BYTES = 4  # parameters, gradients and optimizer state are fp32
_RANKS_COUNTED = 64  # beyond this many the bytes of a growth are counted for one rank only


def describe(config: Config, *, world: int) -> str:
    """The text of a dry run on `world` processes.

    Raises:
        MegagrowError: whatever would stop the run before its first step.
    """
    plan = plan_run(config, world=world, vocabulary=_vocabulary(config))
    lines = [f"{config.run.dir}: {world} processes, {plan.total_steps} steps"]
    for stage in plan.stages:
        lines += ["", *_stage_lines(config, plan, stage.index)]
    last = plan.stages[-1].plan
    rate = plan.learning_rate
    lines += [
        "",
        f"in all: {human(last.end_tokens, 'tokens')}, {human(last.end_flops, 'FLOP')}",
        f"learning rate: {rate.kind}, peak {rate.peak:g}, warm-up {rate.warmup} steps, "
        f"decay {rate.decay_steps} steps"
        + "".join(f", re-warm {n} steps at {at}" for at, n in rate.rewarms),
    ]
    return "\n".join(lines)


def _vocabulary(config: Config) -> int | None:
    """Of the dataset; None where there is none yet and the model names its own."""
    if config.model.vocab is not None and not (Path(config.data.path) / MANIFEST).exists():
        return None
    return open_dataset(config.data.path, config.data.tokenizer).vocab_size


def _stage_lines(config: Config, plan: RunPlan, index: int) -> list[str]:
    stage = plan.stages[index]
    model, steps = stage.model, stage.plan
    placement = plan.placement(index)
    shape = f"{model.layers} layers x {model.hidden} hidden x {model.heads} heads x {model.ffn} ffn"
    lines = [
        f"stage {index}: {shape}, sequence {model.sequence}, vocabulary {model.vocabulary}",
        f"  parameters  {placement.catalog.parameters:,}",
        f"  layout      {stage.layout}",
        f"  steps       {steps.start_step} to {steps.end_step}  "
        f"({human(steps.end_tokens - steps.start_tokens, 'tokens')}, "
        f"{human(steps.end_flops - steps.start_flops, 'FLOP')})",
        f"  memory      {_memory(plan, index)} a rank at most, without activations",
    ]
    if stage.growth is not None and stage.grow is not None:
        lines.insert(
            1,
            f"  grows by    {stage.growth.operator.name} x{stage.grow.factor}, "
            f"state policy {stage.growth.policy.name}",
        )
    if index > 0:
        lines.append(f"  moves       {_moved(config, plan, index)}")
    return lines


def _memory(plan: RunPlan, index: int) -> str:
    """Parameters, gradients and optimizer state of the fullest rank."""
    placement, layout = plan.placement(index), plan.stages[index].layout
    most = 0
    for pipe in range(layout.pipeline):
        rank = layout.rank(pipe=pipe, data=0, tensor=0)
        held = sum(shard.box.volume for shard in placement.shards(rank))
        local = sum(
            placement.local(tensor, 0).numel
            for _, tensors in placement.groups(pipe)
            for tensor in tensors
        )
        gradients = held if layout.zero >= 2 else local
        # At ZeRO 0 the parameters are their own master copy.
        states = held * len(ADAM_SLOTS) if layout.zero else held * (len(ADAM_SLOTS) - 1)
        most = max(most, _BYTES * (local + gradients + states))
    return human(most, "B")


def bytes_moved(plan: RunPlan, index: int, *, ranks: Sequence[int]) -> tuple[int, int]:
    """Bytes of state that the growth into a stage copies to some ranks.

    Returns:
        (all that is copied, what of it comes from another rank).
    """
    stage, old, new = plan.stages[index], plan.placement(index - 1), plan.placement(index)
    state_map = stage.growth or Identity(new.catalog)
    copied = crossed = 0
    for rank in ranks:
        for move in plan_receives(state_map, old, new, slots=ADAM_SLOTS, rank=rank):
            copied += move.part.volume * _BYTES
            crossed += move.part.volume * _BYTES * (move.holder != rank)
    return copied, crossed


def _moved(config: Config, plan: RunPlan, index: int) -> str:
    world = plan.stages[index].layout.world
    ranks = range(world) if world <= _RANKS_COUNTED else range(1)
    copied, crossed = bytes_moved(plan, index, ranks=ranks)
    per = "in all" if len(ranks) == world else "on rank 0"
    staging = human(config.growth.staging_mib * 2**20, "B")
    return (
        f"{human(copied, 'B')} {per}, {human(crossed, 'B')} of it between ranks; "
        f"staging at most {staging} a rank"
    )
