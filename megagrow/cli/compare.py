"""Compare runs on one page: losses over compute and tokens, costs, settings that differ."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megagrow.arguments import Parser, as_output, as_path
from megagrow.errors import exit_status

EXAMPLES = """\
  python launch/compare.py runs/scratch runs/grown
  python launch/compare.py runs/scratch runs/grown --output runs/pair.html --svg runs/pair.svg

The first run is what the others are compared with: the control.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", type=as_path, nargs="+", help="directories of runs"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=as_output,
        default=Path("comparison.html"),
        help="the page (default: comparison.html)",
    )
    parser.add_argument(
        "--svg", metavar="FILE", type=as_output, help="loss over compute as a figure, too"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from megagrow.errors import ConfigError
    from megagrow.report.compare import open_runs, write_comparison, write_figure
    from megagrow.report.figure import require_matplotlib

    for option, path, end in (("output", options.output, ".html"), ("svg", options.svg, ".svg")):
        if path is not None and path.suffix != end:
            raise ConfigError(
                f"--{option} {path}: not a file of its kind",
                expected=f"a name that ends in {end}",
                fix=f"--{option} {path.with_suffix(end)}",
            )
    if options.svg is not None:
        require_matplotlib()
    runs = open_runs(options.run_dirs)
    write_comparison(runs, options.output)
    print(options.output)
    if options.svg is not None:
        write_figure(runs, options.svg)
        print(options.svg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write the page and print its path; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
