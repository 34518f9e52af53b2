"""Train a language model that grows while it trains; see --help."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence

from megagrow.arguments import Parser, as_path_text
from megagrow.cluster import lifeline
from megagrow.cluster.environment import require_one_task
from megagrow.cluster.rank import under_supervision
from megagrow.errors import ConfigError, MegagrowError
from megagrow.processes import start_up
from megagrow.train.health.signals import StoppedWhileStarting, StopRequest, exit_status
from megagrow.train.job import LostContactError, leave_job, run_job

_RANK_0_SPEAKS_SECONDS = 2.0

EXAMPLES = """\
  # two processes on a CPU
  DS_ACCELERATOR=cpu deepspeed --hostfile none --num_gpus 2 \\
      launch/pretrain.py --config configs/quickstart.yaml

  # one process, no launcher; any setting can be given by its dotted key
  python launch/pretrain.py --config configs/quickstart.yaml run.dir=runs/one batch.micro=8

  # what would happen on 8 processes, without training
  python launch/pretrain.py --config configs/quickstart.yaml --dry-run --world 8 --memory 80GB
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Train a language model that grows while it trains.", examples=EXAMPLES
    )
    add = parser.add_argument
    add(
        "--config",
        type=as_path_text,
        required=True,
        metavar="FILE",
        help="YAML file that describes the run",
    )
    add(
        "--resume",
        type=as_path_text,
        default="auto",
        metavar="auto|good|never|PATH",
        help="go on from the run's newest checkpoint if there is one (auto, the default), "
        "from the newest that is undamaged (good), never, or from the checkpoint at PATH",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check the configuration, print stages, sizes and costs, and end without training",
    )
    add("--world", type=int, metavar="N", help="number of processes to plan a dry run for")
    add("--memory", metavar="SIZE", help="of one device, for a dry run (80GB); default: this one's")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    add("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    silence = io.StringIO()
    with contextlib.ExitStack() as only_rank_0_speaks:
        if not _is_first():
            only_rank_0_speaks.enter_context(contextlib.redirect_stdout(silence))
            only_rank_0_speaks.enter_context(contextlib.redirect_stderr(silence))
        # Overrides and options may come in any order.
        return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace, stop: StopRequest) -> int:
    """Do what the command line asks for; returns the exit status."""
    from megagrow.data.dataset import as_prepared_by
    from megagrow.train.ready import ready
    from megagrow.train.run_config import load_run

    start_up.ends("imports")
    config = load_run(options.config, options.overrides, resume=options.resume)
    world = _world(options)
    if options.dry_run:
        from megagrow.plan.dry_run import check_memory, describe

        with as_prepared_by(options.config, *config.data.paths):
            text = describe(config, world=world, resume=options.resume)
        if _is_first():
            print(text)
        fits = check_memory(config, world=world, memory=options.memory)
        if _is_first():
            print(fits)
        return 0
    if options.memory is not None:
        raise ConfigError(
            "--memory: only for --dry-run",
            found=f"--memory {options.memory}",
            fix="add --dry-run, or leave --memory out",
        )
    from megagrow.train.opening import look_ahead

    require_one_task(os.environ)
    with as_prepared_by(options.config, *config.data.paths):
        found = ready(config, world=world)
    assert found.data is not None

    over = look_ahead(
        found.config, plan=found.plan, data=found.data, world=world, resume=options.resume
    )
    if over is not None:
        if _is_first():
            print(over, file=sys.stderr)
        return 0
    try:
        return exit_status(run_job(found, resume=options.resume, stop=stop).signal)
    finally:
        leave_job()


def _world(options: argparse.Namespace) -> int:
    """Number of processes to plan for."""
    if options.world is None:
        return int(os.environ.get("WORLD_SIZE", "1"))
    if options.dry_run and options.world < 1:
        raise ConfigError(
            f"--world {options.world}: not a number of processes", expected="a positive number"
        )
    if not options.dry_run:
        raise ConfigError(
            "--world: only for --dry-run; a real run has as many processes as are started",
            found=f"--world {options.world}",
            fix="leave --world out and start N processes: deepspeed --num_gpus N ...",
        )
    return int(options.world)


def _joined() -> bool:
    """Whether this process and the others know of each other, so that rank 0 tells for all."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a rank, or the whole job: the exit status, which a supervisor is told if there is one."""
    return under_supervision(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    """Parse, run, and turn an error that the user can fix into a message and a status."""
    start_up.begin()
    options = parse(arguments)
    try:
        with StopRequest(speaking=_is_first()).listening() as stop:
            return run(options, stop)
    except MegagrowError as error:
        lifeline.say("failed", text=str(error), kind=type(error).__name__)
        if _is_first():
            print(f"error: {error}", file=sys.stderr)
        elif not _joined():
            # Rank 0 knows nothing of it, and would only miss this rank.  Where all ranks are
            # refused alike, rank 0 says so first, and the launcher ends the others meanwhile.
            time.sleep(_RANK_0_SPEAKS_SECONDS)
            print(f"rank {os.environ['RANK']}: error: {error}", file=sys.stderr)
        return 1
    except LostContactError as lost:
        lifeline.say("failed", text=lost.found, follows=True)
        if not lost.reported:
            print(
                f"error: rank {os.environ.get('RANK', '0')} lost contact with another rank, whose "
                f"own message, if it could give one, tells why\n  found:    {lost.found}\n"
                "  fix:      fix that, then go on from the last checkpoint with --resume auto",
                file=sys.stderr,
            )
        return 1
    except StoppedWhileStarting as stopped:
        lifeline.say("stopped", text="before training began")
        if _is_first():
            print(
                f"stopped by {stopped} before training began: nothing was trained, and the "
                "checkpoints of the run, if it has any, are as they were",
                file=sys.stderr,
            )
        return exit_status(stopped.signal)
