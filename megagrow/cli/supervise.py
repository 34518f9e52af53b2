"""Start a job, watch it, end it when it fails, and restart it; see --help."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagrow.arguments import Parser, as_path, number, whole
from megagrow.cluster import launchers
from megagrow.cluster.hosts import Fleet, Here, OverSsh
from megagrow.cluster.nodes import Agent, NodeJob, Nodes, master_of
from megagrow.cluster.roster import STATUS_CONFIG
from megagrow.cluster.supervisor import Limits, Supervisor
from megagrow.errors import ConfigError, MegagrowError

EXAMPLES = """\
  # this machine: two ranks on a CPU
  DS_ACCELERATOR=cpu python launch/supervise.py --ranks 2 \\
      launch/pretrain.py --config configs/quickstart.yaml

  # the hosts of a file, by ssh; read again at every restart
  python launch/supervise.py --hostfile hosts --restarts 5 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

  # one of two nodes that a scheduler starts (on the other one: --node-rank 1); no ssh
  MEGAGROW_TOKEN=any-secret python launch/supervise.py \\
      --nnodes 2 --node-rank 0 --master node1:29400 --ranks 8 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

  # under srun, one task a node: the same, read from Slurm's variables
  srun --ntasks-per-node 1 python launch/supervise.py --scheduler slurm --ranks 8 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

exit status:
  0   every rank has done its work
  75  stopped by SIGTERM or SIGUSR1 and saved: start it again (schedulers requeue on it)
  78  the configuration is wrong: starting again would not help
  1   it failed, and --restarts did not fix it
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    default = Limits()
    parser = Parser(
        usage="%(prog)s [options] SCRIPT|train [its arguments]",
        description="Start a job, watch every rank over its own connection, end it when it "
        "fails, and restart it from its last checkpoint.",
        examples=EXAMPLES,
    )
    where = parser.add_argument_group("where")
    add = where.add_argument
    add("--ranks", type=whole(1), metavar="N", help="on each node; default: one per device")
    add("--hostfile", type=as_path, metavar="FILE", help="hosts, to be reached by ssh")
    add("--nnodes", type=whole(1), metavar="N", help="nodes, each started by a scheduler")
    add("--node-rank", type=whole(0), metavar="I", help="which of them this is, from 0")
    add("--master", metavar="HOST:PORT", help="node 0, and a free port of it")
    add(
        "--scheduler",
        choices=["slurm", "kubernetes"],
        help="take those three from the variables of Slurm, or of an indexed Kubernetes Job",
    )
    add("--env", action="append", default=[], metavar="NAME", help="carry to the hosts as well "
        "(NAME_: all that begin so)")  # fmt: skip
    add("--address", help="of this machine, as the hosts reach it; default: found by the route")
    add(
        "--port",
        type=whole(0, 65535),
        default=0,
        help="of this machine, for the lines; default: a free one",
    )
    add(
        "--master-port",
        type=whole(1, 65535),
        metavar="PORT",
        help="of the first host of a hostfile",
    )
    add("--logs", type=as_path, metavar="DIR", help="of a log for each rank; default: RUN/logs")
    when = parser.add_argument_group("when (seconds)")
    for name, text in (
        ("start", "until all ranks have started"),
        ("silence", "without a sign of life from a training rank"),
        ("grace", "after the first failure, for other ranks to report"),
        ("stop", "after a signal, to save"),
        ("backoff", "before the first restart; doubled for each further one"),
    ):
        value = getattr(default, name)
        when.add_argument(f"--{name}", type=number(least=0), default=value, metavar="S",
                          help=f"{text} ({value:g})")  # fmt: skip
    when.add_argument("--restarts", type=whole(0), default=default.restarts, metavar="N",
                      help="without a newer checkpoint in between "
                      f"({default.restarts}; 0: never)")  # fmt: skip
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    launchers.require_script(options.script)
    limits = Limits(start=options.start, silence=options.silence, grace=options.grace,
                    stop=options.stop, restarts=options.restarts,
                    backoff=options.backoff)  # fmt: skip
    fleet: Fleet
    job = _node_job(options, os.environ)
    if job is not None:
        if job.node > 0:
            return Agent(job).run()
        fleet = Nodes(job)
    elif options.hostfile is not None:
        fleet = OverSsh(
            hostfile=options.hostfile,
            environ=os.environ,
            also=options.env,
            address=options.address,
            master_port=options.master_port,
        )
    else:
        fleet = Here(ranks=options.ranks, environ=os.environ)
    logs = options.logs or _logs_of(options.script)
    return Supervisor(
        options.script, fleet=fleet, limits=limits, port=options.port, logs=logs
    ).run()


def _node_job(options: argparse.Namespace, environ: Mapping[str, str]) -> NodeJob | None:
    """The job that this is a node of; None if it is none.

    Raises:
        ConfigError: something is missing, or options are mutually exclusive.
    """
    nodes, node, master = options.nnodes, options.node_rank, options.master
    token = environ.get("MEGAGROW_TOKEN")
    if options.scheduler == "slurm":
        nodes = nodes or int(environ.get("SLURM_STEP_NUM_NODES", "0")) or None
        node = int(environ["SLURM_NODEID"]) if node is None and "SLURM_NODEID" in environ else node
        master = master or _slurm_master(environ)
        token = token or environ.get("SLURM_JOB_ID")
    elif options.scheduler == "kubernetes":
        nodes = nodes or int(environ.get("MEGAGROW_NODES", "0")) or None
        index = environ.get("JOB_COMPLETION_INDEX")
        node = int(index) if node is None and index is not None else node
        master = master or environ.get("MEGAGROW_MASTER")
    if options.scheduler is None and (nodes, node, master) == (None, None, None):
        return None
    given = {"--nnodes": nodes, "--node-rank": node, "--master": master, "MEGAGROW_TOKEN": token}
    missing = [name for name, value in given.items() if value is None]
    if missing or options.hostfile is not None:
        raise ConfigError(
            "a job of several nodes, each started by a scheduler",
            found=f"{', '.join(missing)} not given" if missing else "--hostfile as well",
            expected="--nnodes, --node-rank and --master, or --scheduler, which gives them; "
            "MEGAGROW_TOKEN in the environment, the same on all nodes; no --hostfile",
            fix="see --help",
        )
    if not 0 <= node < nodes:
        raise ConfigError("--node-rank", found=node, expected=f"0 to {nodes - 1} (--nnodes)")
    host, port = master_of(master)
    return NodeJob(
        nodes=nodes, node=node, master=host, port=port, token=str(token), ranks=options.ranks,
        environ=os.environ, join=options.start, silence=options.silence,
    )  # fmt: skip


def _slurm_master(environ: Mapping[str, str]) -> str | None:
    """The first node of the step, and a port derived from the job's number."""
    nodes, job = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_JOB_ID")
    if nodes is None or job is None:
        return None
    try:
        said = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            "--scheduler slurm: the nodes of the step", found=f"scontrol: {error}",
            fix="give --master HOST:PORT",
        ) from error  # fmt: skip
    return f"{said[0]}:{20_000 + int(job) % 10_000}"


def _logs_of(script: Sequence[str]) -> Path | None:
    """The `logs` directory of the run given by --config; None without one."""
    from megagrow.train.run_config import load_run

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--resume", default="auto")
    found, others = parser.parse_known_args(script[1:])
    if found.config is None:
        return None
    overrides = [word for word in others if _is_override(word)]
    config = load_run(found.config, overrides, resume=found.resume)
    return Path(config.run.dir) / "logs"


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise; turns an error that the user can fix into a message and an exit status."""
    options = parse(arguments)
    try:
        return run(options)
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_CONFIG if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
