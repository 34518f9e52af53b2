"""Measure the compute that growth saves; see --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megagrow.arguments import Parser, as_output, as_path, as_path_text, number, whole
from megagrow.errors import ConfigError, MegagrowError

EXAMPLES = """\
  # the compute that growth saves against a tuned from-scratch run; started again, it continues
  python launch/benchmark.py savings --config configs/bench/cpu_savings.yaml

  # more seeds on top of a result from elsewhere: what it contains is not trained again
  python launch/benchmark.py savings --config configs/bench/cpu_2x48.yaml \\
      --known benchmarks/savings_2x48.json --json runs/more.json 'seeds=[1,2,3,4,5,6,7,8]'
"""
_LAUNCHERS = """
Runs are trained in processes that are started here, or that torchrun or the deepspeed launcher
started: these train each run together.
"""
# Of megagrow itself, by `benchmarks/` of a checkout, which is not installed.
IN_A_CHECKOUT = (
    "growth", "throughput", "operators", "dynamics", "faults", "two_hosts", "recovery", "convert",
    "kernels", "mfu", "figures",
)  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: it names a benchmark that is not installed.
    """
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named in IN_A_CHECKOUT:
        raise ConfigError(
            f"benchmark {named}: is not part of the installed package",
            expected="savings; the benchmarks of megagrow itself are in benchmarks/ of a checkout",
            fix=f"clone megagrow's repository, and there: python launch/benchmark.py {named} ...",
        )
    parser = Parser(
        description="Measure the compute that growth saves.  The benchmarks of megagrow itself "
        f"({', '.join(IN_A_CHECKOUT)}) are in a checkout: launch/benchmark.py.",
        examples=EXAMPLES + _LAUNCHERS,
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_savings(parser.add_subparsers(dest="kind", required=True, metavar="savings"))
    return parser.parse_args(arguments)


def add_savings(kinds: argparse._SubParsersAction[Any]) -> None:
    """Add the parser of `savings` to those of the benchmarks."""
    about = "compute saved at equal validation loss"
    parser = kinds.add_parser(
        "savings", help=about, description=f"Measure {about}.", examples=EXAMPLES + _LAUNCHERS
    )
    add = parser.add_argument
    add(
        "--config",
        type=as_path_text,
        required=True,
        metavar="FILE",
        help="YAML file that describes the benchmark",
    )
    add(
        "--jobs",
        type=whole(1),
        metavar="N",
        help="runs at a time, a process each (default: one a core; one on a GPU)",
    )
    add("--minutes", type=number(above=0), metavar="M", help="begin no further leg after so long")
    add("--clock", action="store_true", help="measure the models' speeds in turns, for wall times")
    add("--collect", action="store_true", help="train nothing: report what is finished")
    add("--dry-run", action="store_true", help="print what would be trained, and what it costs")
    add(
        "--known",
        type=as_path,
        action="append",
        default=[],
        metavar="FILE",
        help="a result whose end points are not trained again; may be given several times, and the "
        "file of --json is one by itself",
    )
    add("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark."""
    parser.add_argument("--json", type=as_output, metavar="FILE", help="write all numbers there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from megagrow.savings.command import savings

    return measure(savings, options)


def measure(
    benchmark: Callable[[argparse.Namespace], tuple[dict[str, Any], str]],
    options: argparse.Namespace,
) -> int:
    """Run a benchmark, print its text and write its JSON data; returns the exit status."""
    from megagrow.savings import jobs
    from megagrow.savings.machine import write_json

    try:
        result, text = benchmark(options)
    except MegagrowError as error:
        if jobs.is_first():
            print(f"error: {error}", file=sys.stderr)
        return 1
    if jobs.is_first():
        print(text)
        if options.json is not None and result:  # a plan alone is not a result
            write_json(options.json, result)
            print(f"\nwritten to {os.fspath(options.json)}")
    return 0
