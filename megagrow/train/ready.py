"""All checks before a run's first step that need no other process.

`megagrow train` runs them before it imports DeepSpeed, and its dry run reports the same errors
in the same words.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow import ops
from megagrow.cluster.environment import ranks_here
from megagrow.config import Config
from megagrow.data.dataset import MANIFEST
from megagrow.data.position import Position
from megagrow.data.run_data import RunData, open_data
from megagrow.data.sampler import Int64
from megagrow.engine.deepspeed.drivers import validation_share
from megagrow.errors import DataError, MegagrowError, TrainingError
from megagrow.files import is_url
from megagrow.report.units import human
from megagrow.train.agreement import check_agreement
from megagrow.train.logging.telemetry import require_libraries
from megagrow.train.run_plan import RunPlan, Stage, plan_run, with_vocabulary


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        config: with the vocabulary of the data.
        plan: of all stages.
        data: opened; None in a dry run whose data does not exist yet.
    """

    config: Config
    plan: RunPlan
    data: RunData | None


def ready(config: Config, *, world: int, data_may_come: bool = False) -> Ready:
    """Check everything that needs no other process, and compute the plan.

    Args:
        config: the run.
        world: number of processes.
        data_may_come: whether `data.path` may not exist yet, if the model sets its vocabulary.

    Raises:
        MegagrowError: anything that would stop the run before its first step, or later for lack
            of data.
    """
    data = data_if_there(config, may_come=data_may_come)
    vocabulary = None if data is None else data.vocab_size
    plan = plan_run(config, world=world, vocabulary=vocabulary)
    config = with_vocabulary(config, vocabulary)
    ops.choose(config.ops.backend)
    require_libraries(config)
    _require_directory(Path(config.run.dir))
    if data is not None:
        for index in range(len(plan.stages)):
            _require_samples(config, plan, data, index)
        walk(config, plan, data)
    return Ready(config, plan, data)


def data_lines(found: Ready) -> list[str]:
    """How much of the data a run uses, as lines of text."""
    data, plan = found.data, found.plan
    if data is None:
        path = " or ".join(found.config.data.paths)
        return [f"data: {path} is not there yet, so whether it has enough tokens was not checked"]
    last, asked = plan.stages[-1], found.config.train.validation_samples
    sets, _ = validation_of(found.config, data, last)
    windows = sum(map(len, sets.values()))
    return [
        *_passes(found.config, plan, data),
        f"      {windows} validation samples of {last.model.sequence} tokens"
        + (f", of {asked} asked for: the validation data has no more" if windows < asked else ""),
    ]


def _passes(config: Config, plan: RunPlan, data: RunData) -> Iterator[str]:
    """A line for each dataset: how often the run passes over it."""
    ends = [data.tokens_seen(position) for position in walk(config, plan, data)]
    starts = [dict.fromkeys(ends[0], 0), *ends]
    for number, source in enumerate(data.datasets.values()):
        tokens = source.data.train.total_tokens
        each = [
            f"{_epochs(end[source.name] - start[source.name], tokens)} in stage {index}"
            for index, (start, end) in enumerate(zip(starts, ends, strict=False))
        ]
        several = len(data.datasets) > 1
        yield (
            ("      " if number else "data: ")
            + (f"{source.name}: " if several else "")
            + f"{human(tokens, 'tokens')} to train on, seen "
            + f"{_epochs(ends[-1][source.name], tokens)} times"
            + (f" ({', '.join(each)})" if len(each) > 1 else "")
        )


def walk(config: Config, plan: RunPlan, data: RunData) -> list[Position]:
    """A run's position in its data at the end of each stage.

    Raises:
        DataError: a source of a mixture is over before the run.
    """
    position, ends = Position(), []
    for stage in plan.stages:
        sequence, batch = stage.plan.sequence, stage.plan.batch.global_
        left, inside = stage.plan.steps, False
        while left:
            samples, _ = data.samples_for(
                stage.index,
                sequence,
                seed=config.run.seed,
                position=position,
                batch=batch,
                inside=inside,
            )
            _, done = position.split(sequence, samples.mixture)
            steps = left if samples.limit is None else min(left, (samples.limit - done) // batch)
            position = position.after(steps * batch, sequence=sequence, mixture=samples.mixture)
            left, inside = left - steps, True
        ends.append(position)
    return ends


def validation_of(
    config: Config, data: RunData, stage: Stage
) -> tuple[dict[str, Int64], dict[str, Int64]]:
    """What a stage validates on, by name: the sets of the mean, and those that are only watched.

    Always at the model's full length, so that losses are comparable between stages.

    Raises:
        DataError: a set has fewer tokens than one sample.
    """
    sequence, count = stage.model.sequence, config.train.validation_samples
    multiple = stage.layout.data if stage.layout.pipeline > 1 else 1
    return (
        data.validation_sets(sequence=sequence, count=count, multiple=multiple),
        data.watched_sets(sequence=sequence, count=count),
    )


def start_lines(found: Ready, resume: str) -> list[str]:
    """Where the run would start from, as lines of text.

    Args:
        found: the run.
        resume: as for `launch/pretrain.py`.

    Raises:
        MegagrowError: it cannot start, since what it would resume from is not of this run, or what
            it would start from does not fit.
    """
    return [*_copies_lines(found), *_start_lines(found, resume)]


def _copies_lines(found: Ready) -> list[str]:
    """What copies in the memory of the hosts take, if there are any."""
    every = found.config.checkpoint.memory_every
    if every is None:
        return []
    from megagrow.train.opening import copies_in_words

    # Without a launcher: one rank a GPU, or a core.
    own = torch.cuda.device_count() or os.cpu_count() or 1
    return [copies_in_words(found.plan, every=every, ranks=ranks_here(os.environ) or own)]


def _start_lines(found: Ready, resume: str) -> list[str]:
    root = Path(found.config.run.dir) / "checkpoints"
    if is_url(resume):
        return [f"start: from {resume}, which is downloaded when the run starts; not checked"]
    if found.config.checkpoint.remote is not None:
        return ["start: from the newest checkpoint here or in checkpoint.remote, if there is one; "
                "not checked"]  # fmt: skip
    fresh = found.config.init is None
    if fresh and resume in ("auto", "good", "never") and not root.exists():
        return ["start: from fresh weights"]
    # Not at the top: a dry run of a fresh start does not need it.
    from megagrow.train import checkpoints
    from megagrow.train.init_from import plan_start

    paths = checkpoints.candidates(root, resume)
    if not paths and fresh:
        return ["start: from fresh weights"]
    if not paths:
        first, *more = plan_start(found.config, found.plan, found.data).lines
        return [f"start: {first}", *(f"       {line}" for line in more)]
    checkpoint = checkpoints.open_checkpoint(paths[0])
    if found.data is None:
        return [f"start: from {paths[0]}; without data it was not checked"]
    state, changes = check_agreement(
        checkpoint, config=found.config, data=found.data, plan=found.plan
    )
    lines = [f"start: from step {state.step} ({paths[0]})"]
    return lines + [f"       changed since then: {line}" for line in changes]


def _epochs(tokens: int, size: int) -> str:
    return f"{tokens / size:.3g}"


def data_if_there(config: Config, *, may_come: bool) -> RunData | None:
    """The run's dataset; None if it may not exist yet and the model sets its vocabulary.

    Raises:
        DataError: it is missing or damaged.
    """
    missing = not all((Path(path) / MANIFEST).exists() for path in config.data.paths)
    missing &= not any(Path(path).is_file() for path in config.data.paths)
    if may_come and missing and config.model.vocab is not None:
        return None
    try:
        return open_data(config)
    except DataError as error:
        if may_come and missing:
            raise error.or_fix("give model.vocab=N: a dry run then needs no data") from None
        raise


def _require_directory(run_dir: Path) -> None:
    """Reject a run.dir that cannot become a directory."""
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(run_dir)):
        raise TrainingError(
            f"run.dir = {run_dir}: looks like a URL",
            expected="a directory: logs and locks need a file system",
            fix="set checkpoint.remote to the URL, and run.dir to a directory",
        )
    for path in (run_dir, *run_dir.absolute().parents):
        # One call: between two of them another process may create the directory.
        try:
            mode = path.stat().st_mode
        except NotADirectoryError:
            continue  # continue with its parent
        except OSError:
            if not path.is_symlink():
                continue
            mode = 0
        if stat.S_ISDIR(mode):
            return
        raise TrainingError(
            f"run.dir = {run_dir}: {path} is not a directory",
            expected="a directory, or nothing yet",
            fix="set run.dir to another, for instance run.dir=runs/new",
        )


def _require_samples(config: Config, plan: RunPlan, data: RunData, index: int) -> None:
    """Reject data without a sample for a stage, in training or validation."""
    stage = plan.stages[index]
    try:
        data.samples(
            index,
            stage.plan.sequence,
            seed=config.run.seed,
            position=Position(),
            mixture=data.mixture(index),
        )
        for samples in (s for sets in validation_of(config, data, stage) for s in sets.values()):
            validation_share(
                len(samples),
                data_rank=0,
                data_size=stage.layout.data,
                equal=stage.layout.pipeline > 1,
            )
    except MegagrowError as error:
        raise error.within(f"stages[{index}]", setting="sequence") from None
