"""Generate text with a checkpoint of any format."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.arguments import Parser, as_file, as_output, as_path, number, whole
from megagrow.errors import exit_status

if TYPE_CHECKING:
    import torch

    from megagrow.models.common.parallel import TensorParallel

EXAMPLES = """\
  python launch/generate.py runs/quickstart --prompt 'def ' 'import '
  python launch/generate.py exports/mine --prompts PROMPTS.txt --temperature 0.8 --top-p 0.95
  python launch/generate.py runs/quickstart --samples 4 --tokens 50 --json runs/texts.json

  # a model that one device has no room for: a part on each rank, tensor parallel
  torchrun --nproc-per-node 2 -m megagrow generate runs/quickstart --prompt 'def '
"""
_KEPT = "\n\t"  # control characters that a terminal may get


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("checkpoint", type=as_path, metavar="PATH", help="a checkpoint, or a run")
    add("--from-format", metavar="F", help="of the checkpoint; detected by default")
    add("--prompt", nargs="+", metavar="TEXT", help="texts to continue (default: an empty one)")
    add(
        "--prompts",
        type=as_path,
        metavar="FILE",
        help="a file with one on each line; blank ones are skipped",
    )
    add("--samples", type=whole(1, 10_000), default=1, metavar="N", help="texts for each (1)")
    add("--tokens", type=whole(1), default=100, metavar="N", help="most new tokens (%(default)s)")
    add("--temperature", type=number(least=0), default=1.0, metavar="T", help="0: greedy (1)")
    add("--top-k", type=whole(1), metavar="K", help="draw among the K most probable tokens")
    add(
        "--top-p",
        type=number(above=0, most=1),
        default=1.0,
        metavar="P",
        help="draw among the most probable tokens with this probability together (1)",
    )
    add("--seed", type=whole(0), default=1234, metavar="N", help="of the draws (%(default)s)")
    add("--no-end", action="store_true", help="go on after an end of a document")
    add("--batch", type=whole(1), default=8, metavar="N", help="texts at a time (%(default)s)")
    add("--tokenizer", type=as_file, metavar="PATH", help="default: the model's own")
    add(
        "--allow-other-tokenizer",
        action="store_true",
        help="take one that is not the model's, by the SHA-256 that the checkpoint holds",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--json", type=as_output, metavar="FILE", help="write texts and tokens there, too")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Generate and print."""
    from megagrow.evaluation.scores import choose_device
    from megagrow.models.common.parallel import SERIAL, TensorParallel

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _generate(options, choose_device(options.device), SERIAL, lambda drawn: drawn)
        return
    import torch.distributed as dist

    from megagrow.engine import comm
    from megagrow.errors import ConfigError

    if options.device is not None:
        raise ConfigError(
            f"--device {options.device}: each rank of a job has a device of its own",
            fix="leave --device out; DS_ACCELERATOR=cpu keeps a job off the GPUs",
        )
    job = comm.start()
    try:
        parallel = TensorParallel(dist.group.WORLD, job.rank, job.world)
        _generate(options, job.device, parallel, job.broadcast)
    finally:
        comm.stop()


def _generate(
    options: argparse.Namespace,
    device: torch.device,
    parallel: TensorParallel,
    agree: Callable[[list[int]], list[int]],
) -> None:
    from megagrow.checkpoint.convert.load_model import load_model
    from megagrow.evaluation.generation import Sampling, continue_texts
    from megagrow.evaluation.harness import open_reading
    from megagrow.files import write_atomically

    speaks = parallel.rank == 0

    def say(line: str) -> None:
        if speaks:
            print(line, file=sys.stderr)

    prompts = [text for text in _prompts(options) for _ in range(options.samples)]
    model, shape, at = load_model(
        options.checkpoint, name=options.from_format, device=device, say=say, parallel=parallel
    )
    say(f"{at}: {shape.family}, {shape.layers} layers, {shape.hidden} hidden, on {device}")
    tokenizer = open_reading(
        model,
        shape,
        at,
        options.tokenizer,
        source_format=options.from_format,
        allow_other=options.allow_other_tokenizer,
        say=say,
    )
    texts = continue_texts(
        model,
        shape,
        tokenizer,
        prompts,
        tokens=options.tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        through_ends=options.no_end,
        batch=options.batch,
        device=device,
        agree=agree,
        say=say,
    )
    if not speaks:
        return
    for index, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- {index}")
        print(_printable(text.prompt + text.text))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"checkpoint": str(at), "texts": [asdict(text) for text in texts]}
        write_atomically(options.json, json.dumps(record, indent=1).encode() + b"\n")


def _prompts(options: argparse.Namespace) -> list[str]:
    from megagrow.errors import DataError

    prompts = list(options.prompt or ())
    if options.prompts is not None:
        prompts += _lines(options.prompts)
        if not prompts:
            raise DataError(f"{options.prompts}: no line in it", fix="give a prompt on each line")
    return prompts or [""]


def _lines(path: Path) -> list[str]:
    from megagrow.errors import DataError

    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [line.removesuffix("\r") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as text",
            found=error,
            expected="UTF-8, a prompt on each line",
            fix="give another file",
        ) from error


def _printable(text: str) -> str:
    """Without control characters, with which a model could address a terminal."""
    return "".join(c if c.isprintable() or c in _KEPT else "\ufffd" for c in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and generate; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
