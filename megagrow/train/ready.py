"""All checks before a run's first step that need no other process.

`megagrow train` runs them before it imports DeepSpeed, and its dry run reports the same errors
in the same words.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from megagrow import ops
from megagrow.checkpoint.io.object_store import is_url
from megagrow.config import Config
from megagrow.data.dataset import MANIFEST, PreparedData, open_data
from megagrow.data.sampler import validation_samples
from megagrow.engine.deepspeed.drivers import validation_share
from megagrow.errors import DataError, MegagrowError, TrainingError
from megagrow.report.units import human
from megagrow.train.agreement import check_agreement
from megagrow.train.logging.telemetry import require_libraries
from megagrow.train.run_plan import RunPlan, plan_run, with_vocabulary


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
    data: PreparedData | None


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
    return Ready(config, plan, data)


def data_lines(found: Ready) -> list[str]:
    """How much of the data a run uses, as lines of text."""
    data, plan = found.data, found.plan
    if data is None:
        path = found.config.data.path
        return [f"data: {path} is not there yet, so whether it has enough tokens was not checked"]
    tokens = data.train.total_tokens
    stages = [
        f"{_epochs(s.plan.end_tokens - s.plan.start_tokens, tokens)} in stage {s.index}"
        for s in plan.stages
    ]
    each = f" ({', '.join(stages)})" if len(stages) > 1 else ""
    last = plan.stages[-1].plan
    asked = found.config.train.validation_samples
    windows = len(validation_samples(data.validation, sequence=last.model.sequence, count=asked))
    return [
        f"data: {human(tokens, 'tokens')} to train on, seen "
        f"{_epochs(last.end_tokens, tokens)} times{each}",
        f"      {windows} validation samples of {last.model.sequence} tokens"
        + (f", of {asked} asked for: the validation data has no more" if windows < asked else ""),
    ]


def start_lines(found: Ready, resume: str) -> list[str]:
    """Where the run would start from, as lines of text.

    Args:
        found: the run.
        resume: as for `launch/pretrain.py`.

    Raises:
        MegagrowError: it cannot start, since what it would resume from is not of this run, or what
            it would start from does not fit.
    """
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


def data_if_there(config: Config, *, may_come: bool) -> PreparedData | None:
    """The run's dataset; None if it may not exist yet and the model sets its vocabulary.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(config.data.path)
    missing = not path.exists() or (path.is_dir() and not (path / MANIFEST).exists())
    if may_come and missing and config.model.vocab is not None:
        return None
    try:
        return open_data(config.data)
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


def _require_samples(config: Config, plan: RunPlan, data: PreparedData, index: int) -> None:
    """Reject data without a sample for a stage, in training or validation."""
    stage = plan.stages[index]
    try:
        data.samples(stage.plan.sequence, seed=config.run.seed)
        samples = validation_samples(
            data.validation, sequence=stage.model.sequence, count=config.train.validation_samples
        )
        validation_share(
            len(samples),
            data_rank=0,
            data_size=stage.layout.data,
            equal=stage.layout.pipeline > 1,
        )
    except MegagrowError as error:
        raise error.within(f"stages[{index}]", setting="sequence") from None
