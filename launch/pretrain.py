"""Train a language model that grows while it trains; see --help."""

from __future__ import annotations

import argparse
import os
import sys

from megagrow.errors import MegagrowError

EXAMPLES = """\
examples:
  # two processes on a CPU
  DS_ACCELERATOR=cpu deepspeed --hostfile none --num_gpus 2 \\
      launch/pretrain.py --config configs/quickstart.yaml

  # one process, no launcher; any setting can be given by its dotted key
  python launch/pretrain.py --config configs/quickstart.yaml run.dir=runs/one batch.micro=8

  # what would happen on 8 processes, without training
  python launch/pretrain.py --config configs/quickstart.yaml --dry-run --world 8
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a language model that grows while it trains.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the run's newest checkpoint if there is one (auto, the default), "
        "never, or from the checkpoint at PATH",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check the configuration, print stages, sizes and costs, and end without training",
    )
    add("--world", type=int, metavar="N", help="number of processes to plan a dry run for")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    add("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    from megagrow.config.load import load_config
    from megagrow.data.dataset import open_dataset
    from megagrow.train.plan import plan_run

    config = load_config(options.config, options.overrides)
    world = options.world or int(os.environ.get("WORLD_SIZE", "1"))
    if options.dry_run:
        from megagrow.train.dryrun import describe

        print(describe(config, world=world))
        return
    data = open_dataset(config.data.path, config.data.tokenizer)
    plan = plan_run(config, world=world, vocabulary=data.vocab_size)

    # DeepSpeed takes seconds to import: not before everything that can be refused has been.
    from megagrow.engine import comm
    from megagrow.train.loop import Trainer

    try:
        ranks = comm.start()
        Trainer(config=config, plan=plan, data=data, comm=ranks, resume=options.resume).run()
    finally:
        comm.stop()


def main() -> int:
    """Parse, run, and turn an error that the user can mend into a message and a status."""
    options = parse()
    try:
        run(options)
    except MegagrowError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
