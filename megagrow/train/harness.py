"""The tokenizer of a checkpoint, and tasks of EleutherAI's lm-evaluation-harness on its export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.convert import Job, convert
from megagrow.checkpoint.formats import detect
from megagrow.data.dataset import MANIFEST, read_manifest
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import ConfigError

_FILES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(checkpoint: Path, given: Path | None) -> Path | None:
    """The tokenizer file: the one given, one beside the checkpoint, or its dataset's.

    Args:
        checkpoint: its directory.
        given: a file, or a directory with one.
    """
    places = [given] if given is not None else [checkpoint]
    if given is None:
        kind, at = detect(checkpoint)
        data = kind.open_source(at).config.get("data", {})
        if isinstance(data, dict):
            places += [Path(str(data[key])) for key in ("tokenizer", "path") if data.get(key)]
    for place in places:
        if place.is_file():
            return place
        if (place / MANIFEST).is_file():
            return place / read_manifest(place)[0].tokenizer_file
        for name in _FILES:
            if (place / name).is_file():
                return place / name
    return None


def open_tokenizer(path: Path | None, *, vocabulary: int) -> Tokenizer:
    """Open it, and see that the model knows all of its tokens.

    Raises:
        ConfigError: there is none, or it is another model's.
        DataError: it is damaged.
    """
    if path is None:
        raise ConfigError(
            "the checkpoint does not tell its tokenizer",
            mend="give --tokenizer: a .model or tokenizer.json file, or a prepared dataset",
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"{path}: is not the tokenizer of this model",
            found=f"{tokenizer.vocab_size} tokens",
            expected=f"at most the model's {vocabulary}",
            mend="give the right one with --tokenizer",
        )
    return tokenizer


def evaluate(
    checkpoint: Path,
    *,
    tasks: Sequence[str],
    tokenizer: Path | None,
    scratch: Path,
    source_format: str | None,
    device: str,
    batch: int,
) -> dict[str, Any]:
    """Export for transformers and let the harness evaluate; its results by task.

    Args:
        checkpoint: of any format.
        tasks: names that the harness knows.
        tokenizer: to carry along.
        scratch: a directory for the export.
        source_format: of the checkpoint; None for what it looks like.
        device: as torch names it.
        batch: samples at a time.

    Raises:
        ConfigError: the harness is not installed.
        CheckpointError: the checkpoint cannot be exported.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            "--tasks: the lm-evaluation-harness is not installed",
            found=error,
            expected="the package `lm_eval`",
            mend="pip install lm-eval; --wikitext, --lambada and --text need no package",
        ) from error
    target = scratch / "export"
    job = Job(checkpoint, target, "huggingface", source_format=source_format, tokenizer=tokenizer)
    convert(job)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={target}",
        tasks=list(tasks),
        device=device,
        batch_size=batch,
    )
    results: dict[str, Any] = found["results"]
    return results
