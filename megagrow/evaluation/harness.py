"""A checkpoint's tokenizer, and EleutherAI's lm-evaluation-harness on an export."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.convert.load_model import read_as_in_training
from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.own_tokenizer import own_tokenizer
from megagrow.config import ModelConfig
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import ConfigError
from megagrow.models.transformer import Transformer


def open_tokenizer(
    checkpoint: Path,
    given: Path | None,
    *,
    vocabulary: int,
    source_format: str | None = None,
    allow_other: bool = False,
) -> tuple[Tokenizer, str]:
    """The tokenizer of a model: the given one, or its own; and a description of its origin.

    Args:
        checkpoint: in any format.
        given: a tokenizer file, or a directory or dataset with one.
        vocabulary: size of the model's.
        source_format: the checkpoint's; detected if None.
        allow_other: accept `given` even if the checkpoint holds the SHA-256 of another.

    Raises:
        ConfigError: there is none, or it has more tokens than the model.
        CheckpointError: it belongs to another model.
        DataError: it is damaged.
    """
    kind, at = detect(checkpoint, source_format)
    found = own_tokenizer(kind.open_source(at), given, allow_other=allow_other)
    fix = "give --tokenizer: a .model or tokenizer.json file, or a prepared dataset"
    if isinstance(found, str):
        raise ConfigError("the model's tokenizer is not found", found=found, fix=fix)
    if found.file is None:
        raise ConfigError(f"{found.said}: a kind of tokenizer that megagrow does not read", fix=fix)
    tokenizer = found.load()
    if tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"{found.file}: is not the tokenizer of this model",
            found=f"{tokenizer.vocab_size} tokens",
            expected=f"at most the model's {vocabulary}",
            fix="give the right one with --tokenizer",
        )
    return tokenizer, found.said


def open_reading(
    model: Transformer,
    shape: ModelConfig,
    checkpoint: Path,
    given: Path | None,
    *,
    source_format: str | None = None,
    allow_other: bool = False,
    say: Callable[[str], object],
) -> Tokenizer:
    """The tokenizer of a loaded model, which from now on reads documents as its run did.

    Args:
        model, shape, checkpoint: as `load_model` gave them.
        given, source_format, allow_other: as for `open_tokenizer`.
        say: called with lines on the tokenizer, and on documents if they do not see each other.

    Raises:
        MegagrowError: as `open_tokenizer`.
    """
    tokenizer, said = open_tokenizer(
        checkpoint,
        given,
        vocabulary=shape.vocabulary,
        source_format=source_format,
        allow_other=allow_other,
    )
    say(f"tokenizer: {said}")
    if read_as_in_training(model, shape, checkpoint, eod=tokenizer.eod, name=source_format):
        say("documents: do not see each other, as in training, nor an end token before them")
    return tokenizer


@dataclass(frozen=True)
class Tasks:
    """Options of the harness, under the names of its own command line.

    Attributes:
        names: tasks, groups or tags, or name patterns.
        fewshot: examples before each question; None for each task's default.
        limit: samples per task (below 1: the fraction of them); None for all.
        include: a directory with descriptions of additional tasks.
    """

    names: Sequence[str]
    fewshot: int | None = None
    limit: float | None = None
    include: Path | None = None


def evaluate(
    checkpoint: Path,
    *,
    tasks: Tasks,
    tokenizer: Path | None,
    scratch: Path,
    source_format: str | None,
    device: str,
    batch: int,
    allow_other: bool = False,
) -> dict[str, Any]:
    """Export for transformers and run the harness; returns its results by task.

    Args:
        checkpoint: in any format.
        tasks: the tasks and their options.
        tokenizer: to export; None for the model's own.
        scratch: a directory for the export.
        source_format: the checkpoint's; detected if None.
        device: torch's name of the device.
        batch: batch size.
        allow_other: as in `open_tokenizer`.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
        CheckpointError: the checkpoint cannot be exported, or the tokenizer is another model's.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "--tasks: the lm-evaluation-harness is not installed",
            found=error,
            expected="the package `lm_eval`",
            fix="pip install lm-eval; --wikitext, --lambada and --text need no package",
        ) from error
    if tasks.include is not None and not tasks.include.is_dir():
        raise ConfigError(f"--include-path {tasks.include}: no such directory")
    include = None if tasks.include is None else str(tasks.include)
    manager = TaskManager(include_path=include)
    names = [_known(name, manager) for name in tasks.names]
    target = scratch / "export"
    job = Job(
        checkpoint,
        target,
        "huggingface",
        source_format=source_format,
        tokenizer=tokenizer,
        allow_other_tokenizer=allow_other,
    )
    for note in convert(job).notes:
        print(note)
    if not (target / "tokenizer_config.json").exists() and not (target / "vocab.json").exists():
        raise ConfigError(
            "--tasks: the model's tokenizer is not found",
            fix="give --tokenizer: a .model or tokenizer.json file, or a prepared dataset",
        )
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(target)},
            tasks=[name for matched in names for name in matched],
            num_fewshot=tasks.fewshot,
            limit=tasks.limit,
            task_manager=manager,
            device=device,
            batch_size=batch,
        )
    except OSError as error:  # a missing dataset, or no network to download it
        raise ConfigError(
            f"--tasks {','.join(tasks.names)}: the harness cannot get what they need",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error
    results: dict[str, Any] = found["results"]
    return results


def _known(name: str, manager: Any) -> list[str]:
    """The tasks that a name or pattern matches."""
    matched: list[str] = manager.match_tasks([name])
    if matched:
        return matched
    near = difflib.get_close_matches(name, manager.all_tasks, n=5)
    raise ConfigError(
        f"--tasks {name}: the harness knows no such task",
        expected=f"for instance {', '.join(near)}" if near else None,
        fix="lm-eval ls tasks lists all; --include-path adds a directory with others",
    )
