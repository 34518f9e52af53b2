"""Offline growth: read a checkpoint, write the checkpoint of the grown model piece by piece.

The new checkpoint is in the state in which a live growth would have left the run: at the start of
the next growth stage, with the step, the consumed data and the optimizer rules that go with it.
A run therefore resumes from it with a configuration whose next stage has this `grow` section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import BUFFER_BYTES, Job, convert
from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.checkpoint.interface.grown import GrownCheckpoint
from megagrow.checkpoint.interface.history import KEY, growth_record, history, source_name
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.checkpoint.native.steps import find, step_of, step_path
from megagrow.config import Config, GrowConfig, ModelConfig
from megagrow.config.load import parse_config
from megagrow.data.position import Position
from megagrow.data.run_data import open_data
from megagrow.errors import CheckpointError, ConfigError, GrowthError
from megagrow.growth.operators.ligo import Fitted
from megagrow.growth.plan import Growth, plan_growth
from megagrow.growth.training import trained_catalog
from megagrow.schedule.stages import sample_length, stage_batch, stage_optimizer
from megagrow.state.boxes import whole
from megagrow.state.catalog import MASTER, slots_of
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.train.fingerprints import is_of_run, require_run, require_same_data
from megagrow.train.fit import GrowthFit, fit_growth
from megagrow.train.grown_stages import with_growth
from megagrow.train.new_tokenizer import NewTokenizer, new_tokenizer, sized
from megagrow.train.state import RunState
from megagrow.transfer.ends import Source as Ends
from megagrow.transfer.moves import Locator
from megagrow.transfer.read_through import Through
from megagrow.transfer.state_map import StateMap
from megagrow.transfer.whole_state import MemoryState

_STAGING_BYTES = 16 << 20


@dataclass(frozen=True)
class OfflineGrowth:
    """A planned and checked growth of a checkpoint; nothing is written yet.

    Attributes:
        checkpoint: the small model's.
        growth: the growth to apply.
        small, model: the model before and after.
        state: the run state after the growth.
        config: the run's configuration, including the growth.
        brought: the tokenizer that the growth brings, if it does.
    """

    checkpoint: CheckpointSource
    growth: Growth
    small: ModelConfig
    model: ModelConfig
    state: RunState
    config: Config
    brought: NewTokenizer | None = None

    def __call__(self, source: CheckpointSource) -> CheckpointSource:
        """The grown checkpoint, as a source."""
        state_map: StateMap = self.growth
        old: Ends = source
        locator: Locator = source
        state = self.state
        if self.growth.fit_steps:
            old, fit, position = _fitted(self)
            target = self.growth.target
            state_map, locator = Fitted(target), Placement(target, Layout())
            state = replace(state, flops=state.flops + fit.flops, position=position)
        values = Through(
            state_map,
            old,
            locator,
            slots=source.slots,
            dtype=self.dtype,
            seed=self.config.run.seed,
            staging_bytes=_STAGING_BYTES,
        )
        return GrownCheckpoint(
            source,
            values,
            catalog=self.growth.target,
            config=self.config.model_dump(mode="json", by_alias=True),
            run_state=state.to_json(),
            fingerprints=_fingerprints(source, self.brought),
        )

    def __str__(self) -> str:
        """Equal for equal growths: identifies an interrupted conversion."""
        return json.dumps(
            [self.config.model_dump(mode="json", by_alias=True), self.state.to_json()]
        )

    @property
    def bytes(self) -> int:
        """Size of the values that will be written."""
        return sum(
            tensor.volume * self.dtype(tensor.name, slot.name).itemsize
            for tensor in self.growth.target
            for slot in slots_of(tensor, self.checkpoint.slots)
        )

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a target tensor's slot: that of what the tensor is made of."""
        return _dtype(self.growth, self.checkpoint, tensor, slot)


def _dtype(growth: Growth, source: CheckpointSource, tensor: str, slot: str) -> torch.dtype:
    name = growth.blocks(growth.target[tensor])[0].source
    # What was frozen has no moments.
    return source.dtype(name, MASTER.name if name in growth.small.frozen else slot)


def plan_offline(source: Path, grow: GrowConfig) -> OfflineGrowth:
    """Open a checkpoint and plan a growth of it.

    Args:
        source: a checkpoint, a run directory or a directory of checkpoints (then its newest).

    Raises:
        CheckpointError: there is none, it is damaged, or it is not from a training run.
        GrowthError: the growth does not fit the model.
    """
    if grow.tokenizer is not None:
        raise GrowthError(
            f"{source}: a run has one dataset, and so one tokenizer, from first step to last",
            fix=f"start another run with init.from={source}, data of the new tokenizer and this "
            "growth in stages[0]; or grow into another format (--format huggingface)",
        )
    return plan_of_run(NativeCheckpoint.open(_native(source)), grow)


def plan_of_run(checkpoint: CheckpointSource, grow: GrowConfig) -> OfflineGrowth:
    """Plan a growth of an open checkpoint of a run, of any format; see `plan_offline`."""
    require_run(checkpoint)
    try:
        config = parse_config(checkpoint.config, source=f"{checkpoint.path}: its configuration")
        state = RunState.from_json(checkpoint.run_state)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: not a checkpoint of a training run", found=error
        ) from error
    small = model_of(checkpoint)
    length = sample_length(config, small, state.growth_stage)
    state = replace(state, position=state.position.measured(length))
    grow, model, growth, brought = _planned(grow, small, checkpoint)
    grown = with_growth(config, state, grow, bool(checkpoint.catalog.frozen))
    index = state.growth_stage + 1
    asked = grown.stages[index].train or "all"
    growth = replace(
        growth,
        small=growth.small.with_frozen(checkpoint.catalog.frozen),
        target=trained_catalog(asked, growth.target, growth=growth, index=index),
    )
    optimizer = stage_optimizer(grown, index)
    return OfflineGrowth(
        checkpoint=checkpoint,
        growth=growth,
        small=small,
        model=model,
        state=state.after_growth(growth, betas=optimizer.bias_correction),
        config=grown,
        brought=brought,
    )


def _planned(
    grow: GrowConfig, small: ModelConfig, source: CheckpointSource
) -> tuple[GrowConfig, ModelConfig, Growth, NewTokenizer | None]:
    grow, brought = sized(grow), None
    model, growth = plan_growth(grow, small)
    if grow.tokenizer is not None:
        brought = new_tokenizer(grow, source, rows=(small.vocabulary, model.vocabulary))
        return grow, model, growth.with_tokens(brought.map), brought
    if model == small:
        raise GrowthError(
            "the growth changes nothing: the model has these sizes already",
            fix="give larger sizes as its target, or a factor",
        )
    return grow, model, growth, brought


def _fingerprints(source: CheckpointSource, brought: NewTokenizer | None) -> Mapping[str, str]:
    """Those of the grown checkpoint: with another tokenizer it is no longer one of the old data."""
    return source.fingerprints if brought is None else {"tokenizer": brought.sha256}


# The settings of a `grow` section that concern weights alone; all others need a run.
_OF_WEIGHTS = {
    "operator", "factor", "target", "noise", "shrink", "sources", "keep_first", "keep_last",
    "tokenizer", "old_tokenizer", "allow_dropped",
}  # fmt: skip


@dataclass(frozen=True)
class Grow:
    """Grows a checkpoint of any format during a conversion; used as `Job.transform`.

    A run's checkpoint becomes a checkpoint of the grown run, and weights without a run become
    weights of the grown model.  Without a run there is no seed: fresh values are drawn with seed 0.
    """

    grow: GrowConfig

    def __str__(self) -> str:
        """The settings, in the form that `--grow` takes."""
        given = self.grow.model_dump(mode="json", exclude_defaults=True)
        return " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())

    def __call__(self, source: CheckpointSource) -> CheckpointSource:
        """The grown checkpoint, as a source; raises as `planned`."""
        return self.planned(source)(source)

    def planned(self, source: CheckpointSource) -> OfflineGrowth | WeightsGrowth:
        """The growth of a checkpoint.

        Raises:
            CheckpointError: it has optimizer state but no run, or its model is unknown.
            GrowthError: the growth does not fit the model, or needs a run.
        """
        if is_of_run(source):
            return plan_of_run(source, self.grow)
        moments = [slot.name for slot in source.slots if slot.kind != "parameter"]
        if moments:
            raise CheckpointError(
                f"{source.path}: has optimizer state but belongs to no run, which would have to "
                "keep the learning rates of old and new parameters",
                found=", ".join(moments),
                fix="start a run from it with init.from, and grow it there; or convert only the "
                "weights (--to-format huggingface), and grow those",
            )
        given = self.grow.model_dump(mode="json", exclude_defaults=True)
        others = {key: value for key, value in given.items() if key not in _OF_WEIGHTS}
        if others:
            raise GrowthError(
                f"{source.path}: weights without a run have no optimizer and no schedule",
                found=", ".join(f"grow.{key} = {value}" for key, value in others.items()),
                fix=f"omit {', '.join(others)}, or start a run from the weights with init.from and "
                "grow it there",
            )
        small = model_of(source)
        grow, model, growth, brought = _planned(self.grow, small, source)
        if growth.fit_steps or growth.ramp is not None:
            needs = (
                "is fitted on the data of a run"
                if growth.fit_steps
                else "unmasks its new units step by step, under a mask that only a run has"
            )
            raise GrowthError(
                f"{source.path}: weights without a run cannot be grown by "
                f"{growth.operator.name}, which {needs}",
                fix="choose another operator, or start a run from the weights with init.from and "
                "grow it there",
            )
        return WeightsGrowth(growth, small, model, grow, brought)


@dataclass(frozen=True)
class WeightsGrowth:
    """A planned growth of weights without a run: the model before and after."""

    growth: Growth
    small: ModelConfig
    model: ModelConfig
    grow: GrowConfig
    brought: NewTokenizer | None = None

    def __call__(self, source: CheckpointSource) -> CheckpointSource:
        """The grown weights, as a source."""
        values = Through(
            self.growth,
            source,
            source,
            slots=source.slots,
            dtype=partial(_dtype, self.growth, source),
            seed=0,
            staging_bytes=_STAGING_BYTES,
        )
        records = list(history(source)) or [{"source": {"name": source_name(source.path)}}]
        config = {
            **source.config,
            "model": self.model.model_dump(mode="json", by_alias=True),
            KEY: [*records, growth_record(self.grow, self.small, self.model)],
        }
        return GrownCheckpoint(
            source, values, catalog=self.growth.target, config=config, run_state=source.run_state,
            fingerprints=_fingerprints(source, self.brought),
        )  # fmt: skip


def _native(source: Path) -> Path:
    """The native checkpoint for a path; other formats are refused by name."""
    try:
        return find(source)
    except CheckpointError:
        other, at = detect(source)  # raises if no format matches
        target = Path("imports") / source.resolve().name
        raise CheckpointError(
            f"{at}: a checkpoint of format {other.name}; this growth is of a run's own",
            fix=f"python launch/grow.py --from {at} --to {target}; or start a run from it with "
            f"init.from={at}, and the growth in stages[0].grow",
        ) from None


def write_offline(
    plan: OfflineGrowth,
    root: Path,
    *,
    layout: Layout | None = None,
    workers: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Path:
    """Write the grown checkpoint; returns its directory.

    This is a conversion with the growth in it (`megagrow.checkpoint.convert.run`): in bounded
    memory, by several threads, into any layout, and resumable after an interruption.  Only a growth
    that is fitted on data needs both models whole, and the run's data.

    Args:
        root: the directory that will hold ``step_<step>``; may also be such a path itself.
        layout: of the result; by default one file.
        workers, buffer_bytes: as for a conversion.

    Raises:
        CheckpointError: the source is damaged, the target exists, or a system call failed;
            nothing is left at the target.
        LockError: another job is writing there.
    """
    if step_of(root) == plan.checkpoint.step:
        root = root.parent
    target = step_path(root, plan.checkpoint.step)
    job = Job(
        source=plan.checkpoint.path,
        target=target,
        target_format="native",
        layout=layout or Layout(),
        transform=plan,
    )
    convert(job, workers=workers, buffer_bytes=buffer_bytes)
    return target


def _fitted(plan: OfflineGrowth) -> tuple[MemoryState, GrowthFit, Position]:
    """The fitted parameters, the fit's cost, and the position in the data after it."""
    data = open_data(plan.config)
    require_same_data(plan.checkpoint, data)
    if plan.config.data.verify:
        data.verify()
    small = MemoryState(
        {
            (t.name, MASTER.name): plan.checkpoint.read(t.name, MASTER.name, whole(t.shape)).float()
            for t in plan.growth.small
        }
    )
    index, seed = plan.state.growth_stage, plan.config.run.seed
    sequence = sample_length(plan.config, plan.small, index - 1)
    last = plan.state.position.taken[-1:]
    mixture = last[0].mixture if last else data.mixture(index - 1)
    samples = data.samples(
        index - 1, sequence, seed=seed, position=plan.state.position, mixture=mixture
    )
    large, fit = fit_growth(
        plan.growth,
        model=plan.model,
        small=small,
        samples=samples,
        first=plan.state.position.split(sequence, mixture)[1],
        batch=stage_batch(plan.config, index),
    )
    position = plan.state.position.after(fit.samples, sequence=sequence, mixture=mixture)
    return large, fit, position
