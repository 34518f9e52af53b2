"""Starts light ranks, as DeepSpeed's launcher and torchrun start heavy ones."""

import argparse
import os
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("hostfile", "master_port", "launcher", "master-addr", "master-port",
                 "max-restarts", "monitor-interval"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("num_gpus", "nproc-per-node", "nnodes", "node-rank"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    here = options.num_gpus or options.nproc_per_node
    first, nodes = here * (options.node_rank or 0), options.nnodes or 1
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *options.script],
            env={**os.environ, "RANK": str(first + i), "WORLD_SIZE": str(nodes * here)},
        )
        for i in range(here)
    ]
    if os.environ.get("LAUNCHER_LEAVES"):
        time.sleep(1)
        os._exit(0)  # as `deepspeed` does whose pdsh was killed
    for rank in ranks:
        rank.wait()
    return 0  # which is not what one may rely on


if __name__ == "__main__":
    sys.exit(main())
