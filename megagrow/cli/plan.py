"""Plan when to grow, how much it saves, and what it costs on a machine; see --help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megagrow.arguments import Parser, as_path, as_path_text
from megagrow.errors import exit_status

EXAMPLES = """\
  # the best schedule for a model and 10 billion tokens, by Chinchilla's law, two growth stages
  python launch/plan.py --config configs/paper/large.yaml --tokens 1e10 --law epoch --stages 2

  # the same from a law fitted to your own runs, with its interval; writes config, page and picture
  python launch/plan.py --config configs/paper/large.yaml --flops 1e18 --fit RUN_A RUN_B RUN_C \\
      --output plans/mine

  # step time, MFU, memory, and what each growth moves, for a run on 512 nodes
  python launch/plan.py --config configs/scale/mt530b_4096.yaml \\
      --machine configs/machines/h100.yaml machine.nodes=512
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        description="Plan when to grow, how much it saves, and what it costs on a machine.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--config",
        type=as_path_text,
        required=True,
        metavar="FILE",
        help="a run; its model is the target",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens",
        type=float,
        help="find the best schedule for the FLOPs of training the target on this many tokens",
    )
    budget.add_argument("--flops", type=float, help="find the best schedule for this many FLOPs")
    laws = parser.add_mutually_exclusive_group()
    laws.add_argument("--law", help="kaplan, chinchilla (default) or epoch")
    laws.add_argument(
        "--fit", type=as_path_text, nargs="+", metavar="RUN_DIR", help="fit the law to these runs"
    )
    add("--bootstrap", type=int, default=200, help="resampled fits (default %(default)s)")
    add("--no-floor", action="store_true", help="fit without the constant E")
    add("--stages", type=int, default=3, help="growth stages at most (default %(default)s)")
    add(
        "--operators",
        default="depth_stack,width",
        help="a depth operator, a width operator, or both (default %(default)s)",
    )
    add(
        "--growth-loss",
        type=float,
        default=0.0,
        metavar="NATS",
        help="what a growth adds to the loss",
    )
    add(
        "--machine",
        type=as_path_text,
        metavar="FILE",
        help="nodes, memory, bandwidths; adds the cost there",
    )
    add("--rank", type=int, help="count the bytes of a growth for this rank alone")
    add(
        "--output",
        type=as_path,
        metavar="DIR",
        help="write config.yaml, plan.html and (with matplotlib) plan.svg there",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that override the file's; machine.KEY=value those of the machine",
    )
    return parser.parse_intermixed_args(arguments)


def check_numbers(options: argparse.Namespace) -> None:
    """Reject numbers that nothing can be planned with.

    Raises:
        ConfigError: a budget, a count or a loss is out of range, or a rank without a machine.
    """
    from megagrow.errors import ConfigError

    ranges = {
        "tokens": (lambda x: 1 <= x <= 1e20, "at least 1, at most 1e20", "--tokens 1e10"),
        "flops": (lambda x: 1 <= x <= 1e35, "at least 1, at most 1e35", "--flops 1e18"),
        "stages": (lambda x: 1 <= x <= 64, "at least 1, at most 64", "--stages 3"),
        "bootstrap": (lambda x: 1 <= x <= 10**6, "at least 1, at most 1e6", "--bootstrap 200"),
        "growth_loss": (lambda x: 0 <= x <= 1e3, "at least 0, at most 1e3", "--growth-loss 0"),
        "rank": (lambda x: 0 <= x < 2**31, "at least 0", "--rank 0"),
    }
    for name, (accepts, expected, example) in ranges.items():
        value = getattr(options, name)
        if value is not None and not accepts(value):  # NaN is in no range
            raise ConfigError(
                f"--{name.replace('_', '-')}: not a number to plan with",
                found=value,
                expected=f"a finite number, {expected}",
                fix=f"for instance {example}",
            )
    if options.rank is not None and options.machine is None:
        raise ConfigError(
            "--rank counts the bytes of a growth on a machine, and none is given",
            found=f"--rank {options.rank}",
            fix="add --machine FILE, or leave --rank out",
        )


def _refuse_options_of_a_search(options: argparse.Namespace) -> None:
    """Reject options that only a search for a schedule uses, if there is no search."""
    from megagrow.errors import ConfigError

    for name in ("law", "fit", "no_floor", "output"):
        if getattr(options, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: for a schedule alone, which is searched for a budget",
                fix="add --tokens 1e10 or --flops 1e18, or leave it out",
            )


def growth_operators(names: str) -> list[str]:
    """The operators to plan with, from a comma-separated list.

    Raises:
        ConfigError: none, more than one of a kind, or one that grows neither depth nor width.
        GrowthError: unknown operator.
    """
    from megagrow.errors import ConfigError
    from megagrow.growth.registry import find_operator

    found = [find_operator(name.strip()) for name in names.split(",") if name.strip()]
    depth, width = sum(one.deepens for one in found), sum(one.widens for one in found)
    if not found or depth > 1 or width > 1 or depth + width < len(found):
        raise ConfigError(
            "--operators: a plan takes one depth operator, one width operator, or one of each",
            found=names,
            expected="for instance depth_stack,width",
            fix="leave --operators out for depth_stack,width",
        )
    return [operator.name for operator in found]


def run(options: argparse.Namespace) -> str:
    """Run the command; returns the text to print."""
    from megagrow.config.load import load_settings, parse_config
    from megagrow.config.yamltext import write_yaml
    from megagrow.errors import ConfigError
    from megagrow.forecast.fit import fit_law
    from megagrow.forecast.machine import MachineConfig
    from megagrow.forecast.scaling import find_law
    from megagrow.models.flops import train_flops_per_token
    from megagrow.plan import proposal_page
    from megagrow.plan.dry_run import vocabulary
    from megagrow.plan.on_machine import describe_on_machine
    from megagrow.plan.proposal import propose, ready_config, run_points
    from megagrow.train.run_config import load_run
    from megagrow.train.run_plan import with_vocabulary

    check_numbers(options)
    ours = [text for text in options.overrides if not text.startswith("machine.")]
    theirs = [
        text.removeprefix("machine.") for text in options.overrides if text.startswith("machine.")
    ]
    config = load_run(options.config, ours)
    machine = (
        load_settings(MachineConfig, options.machine, theirs, option="--machine")
        if options.machine is not None
        else None
    )
    config = with_vocabulary(config, vocabulary(config))
    searches = options.tokens is not None or options.flops is not None
    if not searches and machine is None:
        raise ConfigError(
            "nothing to plan: neither a budget nor a machine is given",
            fix="--tokens 1e10 or --flops 1e18 for a schedule, --machine FILE for costs at scale",
        )
    operators = growth_operators(options.operators)
    if not searches:
        assert machine is not None
        _refuse_options_of_a_search(options)
        return describe_on_machine(config, machine, rank=options.rank)

    if config.init is not None:
        raise ConfigError(
            "init.from: a schedule is searched for training from scratch, which the laws are of",
            fix="leave init out and describe the whole model; or ask for costs alone: --machine",
        )
    fit = None
    if options.fit:
        points = run_points(options.fit, unit="tokens")
        fit = fit_law(
            points, unit="tokens", floor=not options.no_floor, bootstrap=options.bootstrap
        )
    law = fit.law if fit is not None else find_law(options.law or "chinchilla")
    target = config.model_copy(update={"stages": config.stages[:1]})
    found = propose(
        target,
        law=law,
        fit=fit,
        flops=options.flops or options.tokens * train_flops_per_token(target.model),
        operators=operators,
        most_stages=options.stages,
        added_loss=options.growth_loss,
        machine=machine,
    )
    text = proposal_page.table(found)
    if fit is not None:
        for name in ("floor", "n_power", "s_power"):
            low, high = fit.interval(name)
            text += f"\nfitted {name}: {getattr(law, name):.4g} ({low:.4g} to {high:.4g})"
        text += f"\nfitted to {fit.points} points, root mean square error {fit.error:.2%}"
    settings = ready_config(target, found, operators=operators)
    planned = parse_config(settings, source="the planned configuration")
    if machine is not None:
        text += "\n\n" + describe_on_machine(planned, machine, rank=options.rank)
    if options.output is not None:
        text += "\n\n" + proposal_page.write(
            options.output, found, text=text, config=write_yaml(settings)
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, print; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: print(run(options)))
