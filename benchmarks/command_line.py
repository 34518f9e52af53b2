"""Measure megagrow: growth, operators, training speed, compute saved, conversion; see --help."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megagrow.arguments import Parser, as_output, as_path, as_path_text, number, sections, whole
from megagrow.cli.benchmark import EXAMPLES as SAVINGS
from megagrow.cli.benchmark import add_common, add_savings, measure
from megagrow.config.families import ARCHITECTURES
from megagrow.files import SHIPPED

EXAMPLES = """\
  # live growth on four processes, over the standard pairs of layouts
  python launch/benchmark.py growth --ranks 4 --parameters 200e6 --pairs standard

  # one pair of layouts
  python launch/benchmark.py growth --ranks 4 --parameters 200e6 --operator width \\
      --from-layout data=4,zero=1 --to-layout tensor=2,data=2,zero=1

  # each fused op on a GPU, against its rivals
  python launch/benchmark.py kernels --json runs/kernels.json

  # the training step on a GPU, with kernels and without
  python launch/benchmark.py mfu

  # tokens a second of a training step, against plain PyTorch and Hugging Face
  python launch/benchmark.py throughput

  # every growth operator with every state policy, the same data; continues where it was stopped
  python launch/benchmark.py operators --data data/stdlib --work runs/operators --minutes 45

  # conversion of 4.2 GB of training state, against cp and DeepSpeed's ds_to_universal
  python launch/benchmark.py convert --parameters 350e6 --directory /tmp

  # how far grown runs depart from the small run, for the exact policy and the others
  python launch/benchmark.py dynamics --svg runs/dynamics.svg

  # figures of results, drawn again from their JSON without measuring anything
  python launch/benchmark.py figures RESULT.json

  # from a killed rank to the next step, by part
  python launch/benchmark.py recovery --json runs/recovery.json

  # signals, full and broken disks, second jobs: every command that writes gives the same result
  python launch/benchmark.py faults --kills 200 --strikes 400

  # the same for jobs on two hosts: killed, hung, cut off; adds to what the file has
  python launch/benchmark.py two_hosts --faults 50 --json runs/two_hosts.json
"""
_LAUNCHERS = """
Processes are started here, or by torchrun or the deepspeed launcher: then give them as --ranks.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        description="Measure megagrow; every number is a ratio within one run.",
        examples=f"{EXAMPLES}\n{SAVINGS}{_LAUNCHERS}",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    names = (
        "growth|throughput|savings|operators|dynamics|faults|two_hosts|recovery|convert|kernels|mfu"
        "|figures"
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar=names)

    def add_kind(name: str, about: str) -> argparse.ArgumentParser:
        examples = sections(EXAMPLES, name=name) + _LAUNCHERS
        return kinds.add_parser(
            name, help=about, description=f"Measure {about}.", examples=examples
        )

    growth = add_kind("growth", "live growth: time, bytes, memory")
    add = growth.add_argument
    add("--ranks", type=whole(1), default=4, help="processes (default %(default)s)")
    add(
        "--parameters",
        type=number(above=0),
        default=200e6,
        help="of the grown model, at least (default %(default)g)",
    )
    add("--family", choices=tuple(ARCHITECTURES), default="gpt2")
    add("--from-layout", default="zero=1", help="such as data=4,zero=1 (default %(default)s)")
    add("--to-layout", default="tensor=2,zero=1", help="after the growth (default %(default)s)")
    add("--pairs", choices=("standard",), help="several pairs of layouts instead")
    add("--operator", default="width", help="growth operator (default %(default)s)")
    add("--factor", type=whole(2), default=2, help="of the growth (default %(default)s)")
    add("--policy", help="state policy; default: the operator's")
    add(
        "--staging-mib",
        type=number(above=0),
        default=64.0,
        help="staging memory (default %(default)g)",
    )
    add(
        "--files",
        type=as_path_text,
        default="auto",
        metavar="DIR|none|auto",
        help="where to try the way through a checkpoint too; auto: the temporary directory",
    )

    speed = add_kind("throughput", "tokens a second of a training step")
    add = speed.add_argument
    for name, value in (("layers", 6), ("hidden", 256), ("heads", 8), ("ffn", 1024),
                        ("sequence", 256), ("vocab", 4096)):  # fmt: skip
        add(f"--{name}", type=whole(1), default=value, help="of the model (default %(default)s)")
    add("--batch", type=whole(1), default=8, help="samples in a step (default %(default)s)")
    add("--rounds", type=whole(1), default=5, help="turns of each contender (default %(default)s)")
    add("--steps", type=whole(1), default=4, help="training steps in a turn (default %(default)s)")
    add(
        "--ranks",
        type=whole(1),
        default=2,
        help="processes of the comparison of layouts; 1 leaves it out (default %(default)s)",
    )

    add_savings(kinds)
    compared = add_kind("operators", "operators and policies compared")
    add = compared.add_argument
    add("--data", type=as_path, default=Path("data/stdlib"), help="prepared (default %(default)s)")
    add(
        "--work",
        type=as_path,
        default=Path("runs/operators"),
        help="directory of the runs; what is finished there is kept (default %(default)s)",
    )
    add(
        "--minutes",
        type=number(above=0),
        help="start no run after this time, and show what is finished",
    )

    conversion = add_kind("convert", "conversion of a checkpoint")
    add = conversion.add_argument
    add(
        "--parameters",
        type=number(above=0),
        default=350e6,
        help="of the model (default %(default)g)",
    )
    add(
        "--directory",
        type=as_path,
        default=Path(tempfile.gettempdir()),
        help="on the disk to measure; its contents are deleted afterwards (default %(default)s)",
    )
    add("--rounds", type=whole(1), default=3, help="turns of each contender (default %(default)s)")
    departing = add_kind("dynamics", "grown runs compared with the small run")
    add = departing.add_argument
    add("--factor", type=whole(2), default=2, help="of the growth (default %(default)s)")
    add("--before", type=whole(1), default=30, help="steps up to the growth (default %(default)s)")
    add("--steps", type=whole(1), default=30, help="steps after it (default %(default)s)")
    for kind in (compared, departing):
        kind.add_argument(
            "--svg", type=as_output, metavar="FILE", help="draw there (operators: FILE_*.svg)"
        )
    figures = kinds.add_parser(
        "figures",
        help="figures of results, drawn again from their JSON",
        description="Draw the figures of results again, each next to its JSON and by its name.",
        examples=sections(EXAMPLES, name="figures"),
    )
    figures.add_argument("results", nargs="+", type=as_path, metavar="FILE", help="JSON data")
    figures.set_defaults(json=None)
    faults = add_kind("faults", "faults of every command that writes: nothing is lost")
    add = faults.add_argument
    add(
        "--config",
        type=as_path,
        default=SHIPPED / "configs" / "bench" / "faults.yaml",
        help="the run that is killed",
    )
    add("--kills", type=whole(0), default=200, help="SIGKILLs of ranks (default %(default)s)")
    add(
        "--interrupts", type=whole(0), default=20, help="SIGINTs of all ranks (default %(default)s)"
    )
    add("--stops", type=whole(0), default=8, help="SIGSTOPs of a rank (default %(default)s)")
    add(
        "--strikes",
        type=whole(0),
        default=400,
        help="faults of all commands that write (default %(default)s); a part that is given 0 is "
        "not run, and stays as --json has it",
    )
    add("--only", default="", metavar="NAME", help="commands whose names start so")
    add(
        "--keep",
        type=as_path,
        metavar="DIR",
        help="a directory to make and to leave what went wrong in",
    )
    add(
        "--minutes",
        type=number(above=0),
        default=20.0,
        help="each campaign at most (default %(default)g)",
    )
    add("--ranks", type=whole(1), default=2, help="processes of a job (default %(default)s)")
    add("--seed", type=whole(0), default=1, help="of what is drawn (default %(default)s)")

    hosts = add_kind("two_hosts", "faults of jobs on two hosts (namespaces; root): nothing is lost")
    add = hosts.add_argument
    add("--faults", type=whole(1), default=50, help="in all, with those of --json (%(default)s)")
    add("--minutes", type=number(above=0), default=60.0, help="at most (default %(default)g)")
    add("--seed", type=whole(0), default=1, help="of what is drawn (default %(default)s)")
    add("--keep", type=as_path, metavar="DIR", help="a directory to make and leave the last run in")

    recovery = add_kind("recovery", "the time from a lost rank or host to the next step")
    add = recovery.add_argument
    add(
        "--parameters",
        type=number(above=0),
        default=50e6,
        help="of the model, at least (default %(default)g)",
    )
    add(
        "--fault",
        choices=("rank", "host"),
        default="rank",
        help="SIGKILL of a rank, or all processes of one of two nodes stop (default %(default)s)",
    )
    add("--repetitions", type=whole(1), default=5, help="jobs (default %(default)s)")
    add(
        "--silence",
        type=number(above=0),
        default=30.0,
        help="seconds until a silent host counts as lost, as of supervise (default %(default)g)",
    )
    add(
        "--backoff",
        type=number(least=0),
        default=5.0,
        help="seconds before a restart, as of supervise (default %(default)g)",
    )
    add("--directory", type=as_path, help="for the jobs (default: the temporary directory)")
    add("--copies", action="store_true", help="compare with checkpoint.memory_every, in turns")
    add("--against", type=as_path, metavar="DIR", help="another checkout to compare with, in turns")

    fused = add_kind("kernels", "each fused op on a GPU, against its rivals")
    step = add_kind("mfu", "bf16 training steps on a GPU, kernels or not")
    for kind in (fused, step):
        kind.add_argument(
            "--dry-run",
            action="store_true",
            help="tiny, on the CPU, with emulated kernels: shows that it works, not how fast",
        )
    for kind in (
        growth,
        speed,
        compared,
        departing,
        faults,
        hosts,
        recovery,
        conversion,
        fused,
        step,
    ):
        add_common(kind)
    # Overrides and options may be mixed in any order.
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    options = parse(arguments)
    from benchmarks import commands

    return measure(getattr(commands, options.kind), options)
