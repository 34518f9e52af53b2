"""The Python API: the functions that `import megagrow` provides.

Each is a thin layer over the corresponding command. PyTorch and DeepSpeed are imported only when a
function needs them.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megagrow.checkpoint.convert.job import ConversionReport
    from megagrow.checkpoint.interface.format import CheckpointSource
    from megagrow.config import Config
    from megagrow.evaluation.generation import Text
    from megagrow.train.job import Outcome


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, resume: str | Path = "auto"
) -> Config:
    """Read and check the configuration of a run.

    With ``init.from``, the section ``model`` is completed from the checkpoint that the run will
    start from, or resume from.

    Args:
        path: a YAML file; if there is no such file, a name such as ``configs/quickstart.yaml``
            selects the one that ships with megagrow.
        overrides: ``key.sub=value``, in order, as on the command line.
        resume: as for `train_model`; matters only with ``init.from``.

    Raises:
        ConfigError: the file cannot be read, or settings are unknown, missing or out of range;
            all wrong settings are named.
        CheckpointError: what ``init.from`` names cannot be read.

    Example:
        >>> config = megagrow.load_config("configs/quickstart.yaml", ["run.dir=runs/mine"])
        >>> config.model.layers
        2
    """
    from megagrow.train.run_config import load_run

    given = [overrides] if isinstance(overrides, str) else overrides
    return load_run(path, given, resume=resume)


def prepare_dataset(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    **more: Any,
) -> Path:
    """Make a dataset from text: plain, JSON records or tables, a file or a directory.

    Args:
        source: the text; ``stdlib`` stands for the source files of Python's standard library.
        output: the directory to create. If the same dataset is there already, it stays as it is.
        tokenizer: a ``.model`` or ``tokenizer.json``, or the name of one that ships with megagrow;
            by default one with `vocab_size` tokens is trained on the text.
        vocab_size: of the tokenizer to train.
        more: the other options of ``megagrow prepare``, such as ``workers`` or ``text_key``.

    Returns:
        `output`.

    Raises:
        DataError: the text or the tokenizer cannot be read, or another dataset is there.
        TypeError: there is no such option.

    Example:
        >>> megagrow.prepare_dataset("corpus.txt", "data/mine", documents="paragraph")
        PosixPath('data/mine')
    """
    from megagrow.data.prepare import prepare
    from megagrow.data.request import Request
    from megagrow.files import or_shipped

    prepare(
        Request(
            input=str(source),
            output=Path(output),
            tokenizer=None if tokenizer is None else or_shipped(Path(tokenizer)),
            vocab_size=vocab_size,
            **more,
        )
    )
    return Path(output)


def train_model(config: Config, resume: str | Path = "auto") -> Outcome:
    """Train a run to its end, or resume it.

    This process is the whole job, or a rank of a job that a launcher started (then every rank must
    call this). The process group is kept, so several runs may follow each other. SIGTERM, SIGUSR1
    and Ctrl-C end the training at the next safe point, with a checkpoint, as they do for the
    command; signals are handled only in the main thread.

    Args:
        config: the run's configuration.
        resume: ``auto`` resumes from the newest checkpoint of ``run.dir`` if there is one, ``good``
            from the newest undamaged one; ``never``, or the path of a checkpoint.

    Returns:
        The newest checkpoint of the run, and the signal that ended it early, if any.

    Raises:
        ConfigError, DataError, CheckpointError, GrowthError: the run cannot start.
        LockError: another job trains in ``run.dir``.
        TrainingError: the training had to stop.
        LostContactError: another rank of the job is gone.

    Example:
        >>> outcome = megagrow.train_model(config)
        >>> outcome.checkpoint
        PosixPath('runs/mine/checkpoints/step_00001200')
    """
    from megagrow.cluster.environment import require_one_task
    from megagrow.train.checkpoints import DIRECTORY, newest
    from megagrow.train.health.signals import StopRequest
    from megagrow.train.job import Outcome, leave_job, run_job
    from megagrow.train.opening import look_ahead
    from megagrow.train.ready import ready

    resume = os.fspath(resume)
    with StopRequest(speaking=os.environ.get("RANK", "0") == "0").listening() as stop:
        require_one_task(os.environ)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        found = ready(config, world=world)
        assert found.data is not None
        over = look_ahead(
            found.config, plan=found.plan, data=found.data, world=world, resume=resume
        )
        if over is not None:
            return Outcome(newest(Path(config.run.dir) / DIRECTORY))
        atexit.unregister(leave_job)
        atexit.register(leave_job)
        return run_job(found, resume=resume, stop=stop)


def grow_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    operator: str,
    factor: int | None = None,
    sizes: Mapping[str, int] | None = None,
    state_policy: str | None = None,
    to_format: str | None = None,
    **more: Any,
) -> Path:
    """Grow a checkpoint into a checkpoint of a larger model, without a training job.

    Args:
        source: a checkpoint of any format, or a run directory, which means its newest one.
        target: the directory to create.  If a run's native checkpoint stays native, the one that
            will hold ``step_<step>`` of the grown model.
        operator: the name of a growth operator, or several joined by ``+``.
        factor: how many times larger; 2 if no `sizes` are given either.
        sizes: the grown model's sizes, instead of a factor, such as ``{"hidden": 512, "layers":
            12}``.
        state_policy: how optimizer state is carried over; default: the operator's first policy.
        to_format: of the result; default: the source's.
        more: further settings of a ``grow`` section, such as ``rewarm`` or ``noise``.

    Returns:
        The grown checkpoint.

    Raises:
        ConfigError: the settings do not go together.
        CheckpointError: the checkpoint is missing, damaged, or has the optimizer state of no run;
            or the result exists already.
        GrowthError: the growth does not fit the model.

    Example:
        >>> megagrow.grow_checkpoint("runs/mine", "grown", operator="width", factor=2)
        PosixPath('grown/step_00001200')
    """
    from megagrow.checkpoint.convert.run import convert
    from megagrow.config import GrowConfig
    from megagrow.config.load import parse_settings
    from megagrow.train.conversion import grown
    from megagrow.train.grow_offline import OfflineGrowth, write_offline

    target_sizes = None if sizes is None else dict(sizes)
    given = {"operator": operator, "factor": factor, "target": target_sizes,
             "state_policy": state_policy, **more}  # fmt: skip
    grow = parse_settings(GrowConfig, given, source="this growth cannot be")
    plan = grown(Path(source), Path(target), grow, to_format=to_format)
    if isinstance(plan, OfflineGrowth):
        return write_offline(plan, Path(target))
    convert(plan)
    return Path(target)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to_format: str,
    from_format: str | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    zero: int | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    allow_other_tokenizer: bool = False,
    vocab_size: int | None = None,
    ignore: Sequence[str] = (),
    family: str | None = None,
    config: str | Path | None = None,
    shard_gib: float | None = None,
    grow: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> ConversionReport:
    """Convert a checkpoint to another format or layout; the target appears complete or not at all.

    Args:
        source: a checkpoint of any format, or a run directory: its newest one.
        target: the directory to create; it must not exist.
        to_format: ``native``, ``huggingface``, ``deepspeed``, ``universal``, ``megatron`` or
            ``dcp``.
        from_format: the source's format; detected by default.
        tensor, pipeline, data, zero: the layout of the result; by default the source's.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default nothing is rounded.
        tokenizer: a file or a directory to include; by default the model's own.
        allow_other_tokenizer: accept a tokenizer that is not the model's.
        vocab_size: the true vocabulary, where the source has only the padded table (megatron).
        ignore: settings of the source that change nothing, or copies of which the first is right.
        family: the model's, where the source fits several (deepspeed, universal, megatron).
        config: the configuration file of a run that is to start from the result.
        shard_gib: the largest file, for formats that split by size; default: 5.
        grow: a ``grow`` section, such as ``{"operator": "depth_stack", "factor": 2}``: the model is
            grown on the way.
        verify: whether to read the result back and compare every value.

    Returns:
        A report: bytes, seconds, and what was rounded, left out and compared.

    Raises:
        ConfigError: an option does not apply to the format.
        CheckpointError: the source is missing or damaged, cannot be expressed in the format, the
            target exists, or the comparison failed.

    Example:
        >>> report = megagrow.convert_checkpoint("runs/mine", "export", to_format="huggingface")
        >>> report.survey.bytes
        4327680
    """
    from megagrow.checkpoint.convert.run import convert
    from megagrow.train.conversion import conversion

    job = conversion(
        Path(source),
        Path(target),
        to_format=to_format,
        from_format=from_format,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        zero=zero,
        dtype=dtype,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        allow_other_tokenizer=allow_other_tokenizer,
        vocab_size=vocab_size,
        ignore=ignore,
        family=family,
        config=config,
        shard_gib=shard_gib,
        grow=grow or (),
    )
    return convert(job, verify=verify)


def open_checkpoint(path: str | Path, *, from_format: str | None = None) -> CheckpointSource:
    """Open a checkpoint of any format for reading; thread-safe.

    Args:
        path: a checkpoint, or a run directory: its newest one.
        from_format: its format; detected by default.

    Returns:
        The checkpoint, with ``step``, ``layout``, ``config`` and ``catalog``; ``read`` returns any
        box of a logical tensor.

    Raises:
        CheckpointError: it is missing or damaged.

    Example:
        >>> checkpoint = megagrow.open_checkpoint("runs/mine")
        >>> checkpoint.step, checkpoint.catalog.parameters
        (1200, 1081920)
        >>> from megagrow.state.boxes import whole
        >>> tensor = checkpoint.catalog["embedding.token"]
        >>> checkpoint.read(tensor.name, "master", whole(tensor.shape)).shape
        torch.Size([4096, 96])
    """
    from megagrow.checkpoint.convert.registry import detect

    fmt, found = detect(Path(path), from_format)
    return fmt.open_source(found)


def generate_text(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1234,
    tokenizer: str | Path | None = None,
) -> list[Text]:
    """Continue texts with the model of a checkpoint of any format, on a GPU if there is one.

    Args:
        checkpoint: a checkpoint, or a run directory: its newest one.
        prompts: the texts to continue; an empty one begins as a document does.
        tokens: the most tokens that are added to each; fewer if a document ends.
        temperature: divides the logits; 0 takes the most probable token.
        top_k, top_p: draw among so many most probable tokens, or among those that have this
            probability together.
        seed: of the draws.
        tokenizer: default: the model's own.

    Returns:
        For each prompt its `prompt`, the added `text`, its `tokens`, and whether it `ended`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the tokenizer is another model's.
        ConfigError: the model's tokenizer is not found, a number is out of range, or a prompt is
            not text.

    Warns:
        UserWarning: the checkpoint holds something that the model leaves out, or a text is longer
            than what the model sees.

    Example:
        >>> [text] = megagrow.generate_text("runs/mine", ["def "], tokens=20, temperature=0.8)
        >>> print(text.prompt + text.text)
    """
    from megagrow.checkpoint.convert.load_model import load_model
    from megagrow.evaluation.generation import Sampling, continue_texts
    from megagrow.evaluation.harness import open_reading
    from megagrow.evaluation.scores import choose_device

    given = [prompts] if isinstance(prompts, str) else prompts
    device = choose_device(None)
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, shape, at = load_model(Path(checkpoint), device=device, say=warnings.warn)
    own = None if tokenizer is None else Path(tokenizer)
    found = open_reading(model, shape, at, own, say=lambda line: None)
    return continue_texts(
        model,
        shape,
        found,
        given,
        tokens=tokens,
        sampling=sampling,
        device=device,
        say=warnings.warn,
    )
