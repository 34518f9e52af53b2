"""Show the contents of a checkpoint of any format, and check it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megagrow.arguments import Parser, as_path_or_url
from megagrow.errors import exit_status

EXAMPLES = """\
  python launch/inspect.py runs/quickstart
  python launch/inspect.py runs/quickstart/checkpoints/step_00000400 --verify
  python launch/inspect.py MODEL --tensors
  python launch/inspect.py s3://bucket/run --verify
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add(
        "path",
        type=as_path_or_url,
        metavar="PATH|URL",
        help="a checkpoint, or a run directory for its newest; s3://bucket/run as well",
    )
    add("--format", help="of the checkpoint; detected by default")
    add("--tensors", action="store_true", help="list names, shapes, element types")
    add("--verify", action="store_true", help="read all files, compare checksums")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from megagrow.checkpoint.convert.remote import as_local

    with as_local(options.path, values=options.verify) as path:
        if path != options.path:
            print(f"{options.path}\n  read from a temporary copy, as which it is shown:")
        _show(options, path)


def _show(options: argparse.Namespace, place: Path) -> None:
    from megagrow.checkpoint.convert.registry import detect
    from megagrow.checkpoint.convert.summary import describe, list_tensors

    fmt, path = detect(place, options.format)
    source = fmt.open_source(path)
    if options.verify:
        source.verify()
    checksums = "all correct" if options.verify else "not compared"
    print(describe(source, format_name=fmt.name, checksums=checksums))
    if options.tensors:
        print(f"\n{list_tensors(source)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and show; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
