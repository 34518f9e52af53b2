"""Rebuild the report of a run: report.html in its run directory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megagrow.arguments import Parser, as_path
from megagrow.errors import exit_status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, examples="  python launch/report.py runs/quickstart\n")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=as_path, help="directory of the run")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from megagrow.report import write_report

    print(write_report(options.run_dir))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write the report and print its path; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
