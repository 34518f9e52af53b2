"""Evaluate a checkpoint: perplexity, last-word accuracy, bits per byte, tasks; see --help."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megagrow.arguments import Parser, as_file, as_output, as_path, number, whole
from megagrow.errors import exit_status

EXAMPLES = """\
  # word-level perplexity by the WikiText protocol (the file as published: wiki.test.tokens)
  python launch/evaluate.py runs/quickstart --wikitext WIKI.test.tokens

  # LAMBADA's last words (one passage a line, plain or JSON), and bits per byte of any text
  python launch/evaluate.py EXPORT --tokenizer EXPORT/tokenizer.json \\
      --lambada LAMBADA.jsonl --text README.md --stride 512 --json runs/scores.json

  # tasks of EleutherAI's lm-evaluation-harness, on an export for transformers
  python launch/evaluate.py runs/quickstart --tasks hellaswag,piqa --num-fewshot 5 --limit 200
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description="Evaluate a checkpoint of any format.", examples=EXAMPLES)
    add = parser.add_argument
    add(
        "checkpoint", type=as_path, metavar="PATH", help="a checkpoint, or a run for its newest one"
    )
    add("--from-format", metavar="F", help="of the checkpoint; detected by default")
    add("--wikitext", type=as_path, metavar="FILE", help="word perplexity of detokenized text")
    add("--lambada", type=as_path, metavar="FILE", help="accuracy on last words")
    add("--text", type=as_path, nargs="+", metavar="FILE", help="bits per byte of any text")
    add("--tasks", help="of lm-evaluation-harness, joined by commas")
    add("--num-fewshot", type=whole(0), metavar="N", help="examples before each question of a task")
    add(
        "--limit",
        type=number(above=0),
        metavar="N",
        help="samples a task (below 1: the fraction of them)",
    )
    add("--include-path", type=as_path, metavar="DIR", help="descriptions of further tasks")
    add("--tokenizer", type=as_file, metavar="PATH", help="default: the model's own")
    add(
        "--allow-other-tokenizer",
        action="store_true",
        help="take one that is not the model's, by the SHA-256 that the checkpoint holds",
    )
    add("--stride", type=whole(1), metavar="N", help="new tokens a window (default: all of it)")
    add("--batch", type=whole(1), default=8, help="windows at a time (default %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--json", type=as_output, metavar="FILE", help="write the scores there")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print and return the scores."""
    from tqdm import tqdm

    from megagrow.checkpoint.convert.load_model import load_model
    from megagrow.errors import ConfigError
    from megagrow.evaluation import harness
    from megagrow.evaluation import scores as evaluation
    from megagrow.files import write_atomically

    if not (options.wikitext or options.lambada or options.text or options.tasks):
        raise ConfigError(
            "nothing to evaluate on", fix="give --wikitext, --lambada, --text or --tasks"
        )
    given = [n for n in ("num_fewshot", "limit", "include_path") if getattr(options, n) is not None]
    if given and not options.tasks:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names}: for --tasks alone", fix="give --tasks, or leave it out")
    device = evaluation.choose_device(options.device)
    model, shape, at = load_model(
        options.checkpoint, name=options.from_format, device=device, say=print
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{at}: {shape.family}, {count:,} parameters, on {device}")
    scores: dict[str, Any] = {"checkpoint": str(at), "parameters": count}
    if options.wikitext or options.lambada or options.text:
        tokenizer = harness.open_reading(
            model,
            shape,
            at,
            options.tokenizer,
            source_format=options.from_format,
            allow_other=options.allow_other_tokenizer,
            say=print,
        )
        track = partial(tqdm, disable=not sys.stderr.isatty(), leave=False)
        scorer = evaluation.Scorer(model, shape.sequence, device, options.batch, track)
        stride = options.stride or shape.sequence
        files = [(path, False) for path in options.text or ()]
        files = [(options.wikitext, True)] * (options.wikitext is not None) + files
        for path, wikitext in files:
            found = evaluation.score_text(
                scorer,
                tokenizer,
                evaluation.read_text(path),
                where=str(path),
                stride=stride,
                detokenize=wikitext,
            )
            print(
                f"{path}: word perplexity {found.word_perplexity:.4f}, token perplexity "
                f"{found.token_perplexity:.4f}, {found.bits_per_byte:.4f} bits per byte "
                f"({found.words:,} words, {found.tokens:,} tokens, {found.bytes:,} bytes)"
            )
            scores.setdefault("texts", {})[str(path)] = {
                "word_perplexity": found.word_perplexity,
                "token_perplexity": found.token_perplexity,
                "bits_per_byte": found.bits_per_byte,
                **vars(found),
            }
        if options.lambada:
            words = evaluation.score_lambada(
                scorer, tokenizer, evaluation.read_lambada(options.lambada)
            )
            print(
                f"{options.lambada}: last-word accuracy {words.accuracy:.2%} "
                f"({words.right:,} of {words.passages:,}), perplexity {words.perplexity:.4f}"
            )
            scores["lambada"] = {"accuracy": words.accuracy, **vars(words)}
    if options.tasks:
        del model
        with tempfile.TemporaryDirectory() as scratch:
            scores["tasks"] = harness.evaluate(
                at,
                tasks=harness.Tasks(
                    [name.strip() for name in options.tasks.split(",") if name.strip()],
                    fewshot=options.num_fewshot,
                    limit=options.limit,
                    include=options.include_path,
                ),
                tokenizer=options.tokenizer,
                allow_other=options.allow_other_tokenizer,
                scratch=Path(scratch),
                source_format=options.from_format,
                device=str(device),
                batch=options.batch,
            )
        for task, metrics in scores["tasks"].items():
            print(f"{task}: {metrics}")
    _require_numbers(scores)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, json.dumps(scores, indent=1, default=str).encode() + b"\n")
    return scores


def _require_numbers(scores: Any, name: str = "") -> None:
    """Reject a score that is not finite: its model has values that are not.

    A perplexity may be infinite where words are long; it is written as null.
    """
    from megagrow.errors import CheckpointError

    for key, value in scores.items() if isinstance(scores, dict) else ():
        where = f"{name} {key}".strip()
        _require_numbers(value, where)
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if "perplexity" in key and value > 0:
            scores[key] = None
            continue
        raise CheckpointError(
            f"{where} is not a number",
            found=value,
            expected="a finite number; some of the model's values are not finite",
            fix="evaluate an earlier checkpoint",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and evaluate; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
