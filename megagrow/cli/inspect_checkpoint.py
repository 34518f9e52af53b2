#!/usr/bin/env python3
"""Show what a checkpoint of any format holds, and check it."""

from __future__ import annotations

import sys

if __name__ == "inspect":
    # A script of this directory has the directory first in its search path, so `import inspect`
    # finds this file. What was meant is the standard library's module: put it in our place.
    import importlib.machinery
    import importlib.util
    import os

    _here = os.path.dirname(os.path.abspath(__file__))
    _elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != _here]
    _spec = importlib.machinery.PathFinder.find_spec("inspect", _elsewhere)
    assert _spec is not None and _spec.loader is not None
    sys.modules["inspect"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])

_EXAMPLES = """\
  python launch/inspect.py runs/quickstart
  python launch/inspect.py runs/quickstart/checkpoints/step_00000400 --verify
  python launch/inspect.py MODEL --tensors
"""


def main() -> int:
    """Parse arguments, print the summary; returns the exit status."""
    import argparse

    from megagrow.cli import Parser, as_path

    parser = Parser(description=__doc__, examples=_EXAMPLES)
    parser.add_argument(
        "path",
        type=as_path,
        metavar="PATH",
        help="a checkpoint, or a run directory: its newest one",
    )
    parser.add_argument("--format", help="by default what it looks like")
    parser.add_argument("--tensors", action="store_true", help="list names, shapes, element types")
    parser.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from megagrow.checkpoint.convert.registry import detect
    from megagrow.checkpoint.convert.summary import describe, list_tensors
    from megagrow.errors import MegagrowError

    try:
        fmt, path = detect(arguments.path, arguments.format)
        source = fmt.open_source(path)
        if arguments.verify:
            source.verify()
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    checksums = "all correct" if arguments.verify else "not compared"
    print(describe(source, format_name=fmt.name, checksums=checksums))
    if arguments.tensors:
        print(f"\n{list_tensors(source)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
