"""The tokenizer of a checkpoint, and tasks of EleutherAI's lm-evaluation-harness on its export."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.own_tokenizer import own_tokenizer
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import ConfigError


def open_tokenizer(
    checkpoint: Path,
    given: Path | None,
    *,
    vocabulary: int,
    source_format: str | None = None,
    allow_other: bool = False,
) -> tuple[Tokenizer, str]:
    """The tokenizer of a model: the one given, or its own; and where it is from, for a person.

    Args:
        checkpoint: of any format.
        given: a tokenizer's file, or a directory or dataset with one.
        vocabulary: of the model.
        source_format: of the checkpoint; None for what it looks like.
        allow_other: take what is given even if the checkpoint holds the SHA-256 of another.

    Raises:
        ConfigError: there is none, or it knows more tokens than the model.
        CheckpointError: it is another model's.
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


@dataclass(frozen=True)
class Tasks:
    """What the harness is to do; the names of its own command line.

    Attributes:
        names: of tasks, groups or tags, or patterns of names.
        fewshot: examples before each question; None for each task's own number.
        limit: samples of each task (below 1: the fraction of them); None for all.
        include: a directory with descriptions of further tasks.
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
    """Export for transformers and let the harness evaluate; its results by task.

    Args:
        checkpoint: of any format.
        tasks: what to do.
        tokenizer: to carry along; None for the model's own.
        scratch: a directory for the export.
        source_format: of the checkpoint; None for what it looks like.
        device: as torch names it.
        batch: samples at a time.
        allow_other: as in `open_tokenizer`.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
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
    except OSError as error:  # a dataset that is not there, or no network to get it by
        raise ConfigError(
            f"--tasks {','.join(tasks.names)}: the harness cannot get what they need",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error
    results: dict[str, Any] = found["results"]
    return results


def _known(name: str, manager: Any) -> list[str]:
    """The tasks that a name or pattern stands for."""
    matched: list[str] = manager.match_tasks([name])
    if matched:
        return matched
    near = difflib.get_close_matches(name, manager.all_tasks, n=5)
    raise ConfigError(
        f"--tasks {name}: the harness knows no such task",
        expected=f"for instance {', '.join(near)}" if near else None,
        fix="lm-eval ls tasks lists all; --include-path adds a directory with others",
    )
