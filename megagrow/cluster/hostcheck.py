"""Run on each host before the ranks: `python -m megagrow.cluster.hostcheck [--free PORT] ...`."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megagrow.cluster.launchers import is_installed


def faults(options: argparse.Namespace) -> list[str]:
    """What would prevent the job from starting here, in words."""
    found = []
    if not Path(options.script).is_file() and not is_installed(options.script):
        found.append(f"{options.script} is not there: the directory is not shared")
    try:
        socket.create_connection((options.address, options.port), timeout=5).close()
    except OSError as error:
        found.append(
            f"the supervisor at {options.address}:{options.port} cannot be reached from here: "
            f"{error.strerror or error}"
        )
    if options.free is not None:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", options.free))
        except OSError as error:
            found.append(f"port {options.free}, for rank 0: {error.strerror or error}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the faults on one line; returns 0 if there are none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="of the supervisor")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", required=True, help="that the ranks will run")
    parser.add_argument("--free", type=int, help="a port that rank 0 needs here")
    found = faults(parser.parse_args(arguments))
    if found:
        print("; ".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
