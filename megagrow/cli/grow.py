"""Grow a checkpoint offline, or list the growth operators; see --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagrow.arguments import Parser, as_path
from megagrow.cli.convert import FORMATS
from megagrow.errors import exit_status

if TYPE_CHECKING:  # they need PyTorch, whose import takes a second: not for --help
    from megagrow.checkpoint.convert.run import Job
    from megagrow.train.grow_offline import OfflineGrowth, WeightsGrowth

EXAMPLES = """\
  # twice the width; the result is OUT/step_<step>, to resume with pretrain.py --resume OUT
  python launch/grow.py --from runs/quickstart --to OUT --operator width --factor 2

  # a model directory of Hugging Face, twice as deep: another one, to train or to load
  python launch/grow.py --from MODEL --to imports/deeper --operator depth_identity --factor 2

  # a given model, by two operators in one growth
  python launch/grow.py --from runs/quickstart --to OUT --operator width+depth_stack \\
      --target hidden=512 heads=8 ffn=2048 layers=12 --state-policy sparkling

  # more tokens: those of another tokenizer, whose new rows are means of the rows of their pieces
  python launch/grow.py --from MODEL --to imports/more-tokens --operator vocab --tokenizer NEW

  # what there is
  python launch/grow.py --list
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        description="Grow a checkpoint into the checkpoint of a larger model: a run's, or weights "
        "alone, of any format that convert.py reads.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the operators and state policies, and end")
    add("--markdown", action="store_true", help="with --list: as Markdown tables")
    add("--from", dest="source", type=as_path, metavar="CKPT",
        help="a checkpoint, or a run directory for its newest one")  # fmt: skip
    add("--to", dest="target", type=as_path, metavar="DIR",
        help="directory to make; that of step_<step> for a run's native one")  # fmt: skip
    add("--format", choices=FORMATS, help="of the result (the source's)")
    add("--operator", metavar="NAME", help="an operator of --list, or several joined by +")
    add("--factor", type=int, metavar="K", help="how many times larger (2)")
    add("--target", dest="sizes", nargs="+", metavar="SIZE=N",
        help="sizes of the grown model instead of a factor: hidden=512 layers=12")  # fmt: skip
    add("--state-policy", metavar="P", help="what becomes of optimizer state (the first listed)")
    add("--rewarm", type=int, metavar="STEPS", help="steps of re-warming (the policy's own)")
    add("--ramp", type=int, metavar="STEPS", help="steps to fade new units in (the operator's own)")
    add("--fit-steps", type=int, metavar="N", help="steps of fitting ligo (the operator's own)")
    add("--noise", type=float, metavar="S",
        help="noise on copies, in units of their root mean square (operator's own)")  # fmt: skip
    add("--shrink", type=float, metavar="S", help="of shrink_pad_perturb, on old weights (0.4)")
    add("--sources", type=int, nargs="+", metavar="I",
        help="of depth_slices: the old layer that each new one copies")  # fmt: skip
    add(
        "--keep-first",
        type=int,
        metavar="N",
        help="of depth_slices: this many first layers are not copied",
    )
    add("--keep-last", type=int, metavar="N", help="the same for the last layers")
    add("--tokenizer", metavar="PATH",
        help="of vocab: the tokenizer from now on; rows go by the texts of tokens")  # fmt: skip
    add("--old-tokenizer", metavar="PATH", help="the one before (the checkpoint's own)")
    add("--allow-dropped", action="store_true", help="let tokens get lost that it does not have")
    add("--mup", action="store_true", help="divide matrices' rates by the growth of their inputs")
    add("--dry-run", action="store_true", help="check and print sizes; write nothing")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.list:
        wanted = {"--from": options.source, "--operator": options.operator}
        if not options.dry_run:
            wanted["--to"] = options.target
        missing = [name for name, value in wanted.items() if value is None]
        if missing:
            parser.error(f"{' and '.join(missing)} must be given (or --list)")
    return options


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.list:
        from megagrow.growth import table

        print(table.markdown() if options.markdown else table.text())
        return
    from megagrow.checkpoint.convert.run import Job
    from megagrow.train.conversion import grown

    target = options.target or Path("nowhere")  # a dry run needs none
    plan = grown(options.source, target, grow_section(options), to_format=options.format)
    if isinstance(plan, Job):
        _grow_by_conversion(plan, dry_run=options.dry_run)
    else:
        _grow_run(plan, options)


def _grow_run(plan: OfflineGrowth, options: argparse.Namespace) -> None:
    """Grow the native checkpoint of a run into one that it goes on from."""
    from megagrow.checkpoint.interface.accounting import summary
    from megagrow.config.yamltext import write_yaml
    from megagrow.report.units import human
    from megagrow.train.grow_offline import write_offline
    from megagrow.train.growth_words import stages_to_go_on

    old = plan.checkpoint
    print(f"from        {old.path} (step {old.step})")
    for line in summary(old.left_out):
        print(f"left out    {line}")
    _describe(plan, grad_clip=plan.config.optimizer.grad_clip)
    print(f"bytes       {human(old.bytes, 'B')} -> {human(plan.bytes, 'B')}")
    if options.dry_run:
        return
    path = write_offline(plan, options.target)
    print(f"written     {path}")
    print(f"\nresume with  launch/pretrain.py --resume {path} run.dir=NEW and these stages:\n")
    print(write_yaml({"stages": stages_to_go_on(plan)}))


def _grow_by_conversion(job: Job, *, dry_run: bool) -> None:
    """Grow a checkpoint of another format, or into one, or weights without a run."""
    from megagrow.checkpoint.convert.registry import get_format
    from megagrow.checkpoint.convert.run import convert, survey
    from megagrow.checkpoint.interface.accounting import summary
    from megagrow.report.units import human
    from megagrow.train.grow_offline import Grow

    assert isinstance(job.transform, Grow)
    about = survey(job)
    source = get_format(about.source_format).open(about.source, job.read_options)
    print(f"from        {about.source} ({about.source_format}, step {source.step})")
    for line in summary(about.left_out):
        print(f"left out    {line}")
    plan = job.transform.planned(source)
    _describe(plan, grad_clip=0.0)
    print(f"bytes       {human(source.bytes, 'B')} -> {human(about.bytes, 'B')}")
    if dry_run:
        return
    report = convert(job)
    print(f"written     {job.target} ({job.target_format})")
    for line in report.notes:
        print(f"            {line}")


def _describe(plan: OfflineGrowth | WeightsGrowth, *, grad_clip: float) -> None:
    from megagrow.train.growth_words import describe_sizes

    growth = plan.growth
    print(f"growth      {growth.operator.name}, state policy {growth.policy.name}")
    for line in growth.caveats(grad_clip=grad_clip, dropout=plan.model.dropout):
        print(f"            {line}")
    for line in describe_sizes(plan):
        print(f"sizes       {line}")
    for line in plan.brought.lines if plan.brought else ():
        print(f"vocabulary  {line}")
    print(f"parameters  {growth.small.parameters:,} -> {growth.target.parameters:,}")


def grow_section(options: argparse.Namespace) -> Any:
    """The `grow` section for the options; raises ConfigError if they conflict."""
    from megagrow.config import GrowConfig
    from megagrow.config.load import parse_settings

    given = {
        "operator": options.operator,
        "factor": options.factor,
        "target": None if options.sizes is None else dict(map(_size, options.sizes)),
        "state_policy": options.state_policy,
        "rewarm": options.rewarm,
        "ramp": options.ramp,
        "fit_steps": options.fit_steps,
        "noise": options.noise,
        "shrink": options.shrink,
        "sources": options.sources,
        "keep_first": options.keep_first,
        "keep_last": options.keep_last,
        "tokenizer": options.tokenizer,
        "old_tokenizer": options.old_tokenizer,
        "allow_dropped": options.allow_dropped or None,
        "mup": options.mup,
    }
    return parse_settings(GrowConfig, given, source="this growth cannot be")


def _size(text: str) -> tuple[str, int]:
    from megagrow.errors import ConfigError

    key, _, number = text.partition("=")
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise ConfigError(
            f"--target {text}: not a size", expected="such as hidden=512", fix="see --help"
        )
    return key, int(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; turns an error that the user can fix into a message and an exit status."""
    options = parse(arguments)
    try:
        return exit_status(lambda: run(options))
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
