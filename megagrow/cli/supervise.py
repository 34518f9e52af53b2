"""Start a job, watch it, end it when it fails, and restart it; see --help."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megagrow.arguments import Parser, as_path, number, whole
from megagrow.background import Task
from megagrow.cluster import launchers, network, wire
from megagrow.cluster.hostfile import read_hostfile
from megagrow.cluster.hosts import Fleet, OverSsh, Ranks
from megagrow.cluster.hub import Hub
from megagrow.cluster.lifeline import STATUS_STOPPED
from megagrow.cluster.roster import STATUS_CONFIG
from megagrow.cluster.signals import taking
from megagrow.cluster.supervisor import Limits, Supervisor
from megagrow.errors import ConfigError, MegagrowError

EXAMPLES = """\
  # this machine: two ranks on a CPU
  DS_ACCELERATOR=cpu python launch/supervise.py --ranks 2 \\
      launch/pretrain.py --config configs/quickstart.yaml

  # the hosts of a file, by ssh; read again at every restart
  python launch/supervise.py --hostfile hosts --restarts 5 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

  # one of two to eight nodes that a scheduler starts, each with this command; no ssh.  node1
  # keeps the job together: the others come and go
  MEGAGROW_SECRET=$(cat secret) python launch/supervise.py \\
      --nnodes 2:8 --master node1:29400 --ranks 8 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

  # under srun, one task a node: the same, read from Slurm's variables
  srun --ntasks-per-node 1 python launch/supervise.py --scheduler slurm --ranks 8 \\
      launch/pretrain.py --config configs/quickstart.yaml run.dir=/shared/run

exit status:
  0   every rank has done its work
  75  stopped by SIGTERM or SIGUSR1 and saved: start it again (schedulers requeue on it)
  78  the configuration is wrong: starting again would not help
  1   it failed, and --restarts did not fix it; or its command line is wrong
"""

_SUPERVISOR_SECONDS = 60.0


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
    add(
        "--nnodes",
        type=_nodes,
        metavar="N[:M]",
        help="nodes, each started by a scheduler; N:M: at least N, at most M",
    )
    add(
        "--node-rank",
        type=whole(0),
        metavar="I",
        help="which of them this is; 0 keeps the job together; default: found by --master",
    )
    add("--master", metavar="HOST:PORT", help="the node that keeps the job together, and a "
        "free port of it")  # fmt: skip
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
        help="of this machine, for the lifelines; default: a free one",
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


def _nodes(text: str) -> tuple[int, int]:
    """An argparse type: the least and the greatest number of nodes."""
    least, colon, most = text.partition(":")
    number = whole(1)
    found = number(least), number(most if colon else least)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text}: the first number is the least")
    return found


@dataclass(frozen=True)
class Place:
    """Where a job's supervisor is, and what is started here.

    Attributes:
        host, port: of the supervisor, as the nodes reach it; port 0 picks a free one.
        address: of the interface to listen on, if this process is the supervisor.
        decides: whether it is; None: if nobody else is.
        nodes: the least and the greatest number of nodes.
    """

    host: str
    port: int
    address: str
    decides: bool | None
    secret: bytes
    nodes: tuple[int, int] = (1, 1)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    launchers.require_script(options.script)
    limits = Limits(start=options.start, silence=options.silence, grace=options.grace,
                    stop=options.stop, restarts=options.restarts,
                    backoff=options.backoff)  # fmt: skip
    place = place_of(options, os.environ)
    logs = options.logs or _logs_of(options.script)
    hub = _hub(place, limits)
    supervisor: Task[int] | None = None
    if hub is not None:
        place = replace(place, host=hub.address, port=hub.port)
        decide = Supervisor(hub, limits, nodes=place.nodes[0], logs=logs)
        supervisor = Task("supervisor", decide.run)
    fleet: Fleet
    if options.hostfile is not None:
        fleet = OverSsh(
            options.script,
            hostfile=options.hostfile,
            supervisor=(place.host, place.port),
            secret=place.secret,
            environ=os.environ,
            also=options.env,
            master_port=options.master_port,
        )
    else:
        ranks = options.ranks or _devices()
        fleet = Ranks(options.script, ranks=ranks, secret=place.secret, nodes=place.nodes)
    # PyTorch takes seconds to import: first reject everything that can be rejected.
    with taking((signal.SIGTERM, signal.SIGUSR1), _stop_now):
        from megagrow.cluster.agent import Node

    here = place.address if hub is not None else network.address_for([place.host])
    node = Node(
        (place.host, place.port), place.secret, fleet, here=here, join=options.start
    )  # fmt: skip
    status = node.run()
    # The supervisor ends after its nodes, of which this is one.
    if supervisor is not None and supervisor.wait(_SUPERVISOR_SECONDS):
        return supervisor.result()
    return status


def _stop_now(number: int, _: FrameType | None) -> NoReturn:
    """Stop before anything has started, and so with nothing to save."""
    print(f"supervise: {signal.Signals(number).name}: nothing has started", file=sys.stderr)
    sys.exit(STATUS_STOPPED)


def place_of(options: argparse.Namespace, environ: Mapping[str, str]) -> Place:
    """Where the job's supervisor is.

    Raises:
        ConfigError: something is missing, or options are mutually exclusive.
    """
    nodes, node, master = options.nnodes, options.node_rank, options.master
    if options.scheduler == "slurm":
        count = int(environ.get("SLURM_STEP_NUM_NODES", "0"))
        nodes = nodes or ((count, count) if count else None)
        node = int(environ["SLURM_NODEID"]) if node is None and "SLURM_NODEID" in environ else node
        master = master or _slurm_master(environ)
    elif options.scheduler == "kubernetes":
        count = int(environ.get("MEGAGROW_NODES", "0"))
        nodes = nodes or ((count, count) if count else None)
        index = environ.get("JOB_COMPLETION_INDEX")
        node = int(index) if node is None and index is not None else node
        master = master or environ.get("MEGAGROW_MASTER")
    if options.scheduler is None and (nodes, node, master) == (None, None, None):
        address = options.address or "127.0.0.1"
        if options.hostfile is not None and options.address is None:
            names = [host.name for host in read_hostfile(options.hostfile)]
            address = network.address_for([*names[1:], names[0]])
        secret = secrets.token_hex(32).encode()
        return Place(address, options.port, address, True, secret)
    secret_given = wire.secret_of(environ)
    given = {"--nnodes": nodes, "--master": master, wire.SECRET: secret_given}
    missing = [name for name, value in given.items() if value is None]
    if missing or options.hostfile is not None:
        raise ConfigError(
            "a job of several nodes, each started by a scheduler",
            found=f"{', '.join(missing)} not given" if missing else "--hostfile as well",
            expected="--nnodes and --master, or --scheduler, which gives them; "
            f"{wire.SECRET} in the environment, the same on all nodes; no --hostfile",
            fix="see --help",
        )
    if node is not None and not 0 <= node < nodes[1]:
        raise ConfigError("--node-rank", found=node, expected=f"0 to {nodes[1] - 1} (--nnodes)")
    host, port = _master_of(master)
    decides = None if node is None else node == 0
    if decides is None and not network.is_here(host):
        decides = False
    address = options.address or (network.address_of_name(host) if decides is not False else "")
    assert secret_given is not None
    return Place(host, port, address, decides, secret_given, nodes)


def _hub(place: Place, limits: Limits) -> Hub | None:
    """The lifelines' server, if this process decides."""
    if place.decides is False:
        return None
    try:
        return Hub(
            place.secret, address=place.address, port=place.port, silence=limits.silence,
            patience=limits.start,
        )  # fmt: skip
    except MegagrowError:
        if place.decides:
            raise
        return None  # another node on this machine was first


def _devices() -> int:
    """The number of devices of this machine.

    Raises:
        ConfigError: it has none.
    """
    import torch

    count = torch.accelerator.device_count()
    if count == 0:
        raise ConfigError(
            "the number of ranks", found="no device on this machine, and no --ranks",
            expected="a rank for each device, or --ranks", fix="add --ranks N",
        )  # fmt: skip
    return count


def _master_of(text: str) -> tuple[str, int]:
    """Parse ``host:port``.

    Raises:
        ConfigError: it does not have that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError("--master", found=text, expected="HOST:PORT, for instance node1:29400")
    return host.strip("[]"), int(port)


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
