"""The `megagrow` command: imports only the module of the requested subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megagrow import __version__
from megagrow.arguments import Parser
from megagrow.cli.program import run_program

# Each command's module in `megagrow.cli`, and its description.
COMMANDS = {
    "train": ("train", "train a language model that grows while it trains"),
    "supervise": ("supervise", "start a job, watch it, end it when it fails, and restart it"),
    "prepare": ("prepare_data", "make a tokenizer and a dataset from text"),
    "plan": ("plan", "plan when to grow, how much it saves, what it costs on a machine"),
    "grow": ("grow", "grow a checkpoint offline, or list the growth operators"),
    "convert": ("convert", "convert a checkpoint between formats and layouts"),
    "inspect": ("inspect_checkpoint", "show what a checkpoint holds, and check it"),
    "evaluate": ("evaluate", "score a checkpoint: perplexity, last words, bits per byte, tasks"),
    "generate": ("generate", "generate text with a checkpoint"),
    "report": ("report", "rebuild the report of a run"),
    "compare": ("compare", "compare runs: losses, costs, settings that differ"),
    "benchmark": ("benchmark", "measure the compute that growth saves"),
    "configs": ("configs", "list the bundled configurations, or print one"),
}
_EXAMPLES = """\
  megagrow prepare --input stdlib --output data/stdlib_bytes \
      --tokenizer configs/tokenizers/bytes.json --validation-fraction 0.02
  megagrow train --config configs/quickstart.yaml
  megagrow train --help

  # several processes: any launcher that starts a Python module
  deepspeed --num_gpus 8 --module megagrow train --config configs/quickstart.yaml
  torchrun --nproc-per-node 8 -m megagrow train --config configs/quickstart.yaml
  megagrow supervise --ranks 8 train --config configs/quickstart.yaml
"""


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The requested command and its own arguments."""
    words = list(arguments)
    # DeepSpeed's launcher puts this option before all other arguments.
    launcher = [words.pop(0)] if words and words[0].startswith("--local_rank=") else []
    lines = "\n".join(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items())
    parser = Parser(
        prog="megagrow",
        usage="megagrow COMMAND ...",
        description="Pretraining in which a language model grows while it trains.\n\n"
        f"commands (see megagrow COMMAND --help):\n{lines}",
        examples=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"megagrow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser.parse_args(words[:1]).command, launcher + words[1:]


def program() -> None:
    """The installed command."""
    run_program(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    `sys.argv` is set as if the command were a program called `megagrow COMMAND`.
    """
    name, words = parse(sys.argv[1:] if arguments is None else arguments)
    sys.argv = [f"megagrow {name}", *words]
    module = importlib.import_module(f"megagrow.cli.{COMMANDS[name][0]}")
    return int(module.main(words))
