"""A rank that trains nothing: it counts steps, saves their number, and fails on request."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from megagrow.cluster import lifeline
from megagrow.cluster.rank import under_supervision

RANK = int(os.environ["RANK"])


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--dir", type=Path, required=True)
    add("--steps", type=int, default=5)
    add("--fault", action="append", default=[], help="RANK:STEP:KIND, once")
    add("--always", action="store_true", help="not only once")
    add("--fail-at-start", action="store_true")
    add("--resume", default="auto")
    add("--local_rank")
    options, words = parser.parse_known_args()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: asked.append(n))
    with open(options.dir / f"starts_{RANK}", "a") as stream:
        print(os.getpid(), options.resume, os.environ["WORLD_SIZE"], *words, file=stream)
    print(f"rank {RANK} speaks")
    if options.fail_at_start:
        # Rank 0 is ended as soon as another has failed, and shall have noted its start by then.
        while not (options.dir / "starts_0").exists():
            time.sleep(0.01)
        lifeline.say("failed", text="layout.tensor does not divide", kind="ConfigError")
        return 1
    saved = options.dir / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    while step < options.steps:
        lifeline.say("beat", step=step, doing="counting")
        fault = fault_at(options, step)
        if fault:
            fail(fault)
        time.sleep(0.05)
        step += 1
        if RANK == 0:
            whole = options.dir / "saved.new"  # it may be killed at any moment
            whole.write_text(str(step))
            whole.replace(saved)
            lifeline.say("saved", step=step)
        if asked:
            (options.dir / f"stopped_{RANK}").write_text(str(asked[0]))
            return lifeline.STATUS_STOPPED
    return 0


def fault_at(options: argparse.Namespace, step: int) -> str | None:
    for number, text in enumerate(options.fault):
        rank, at, kind = text.split(":")
        done = options.dir / f"fault_{number}"
        if int(rank) == RANK and int(at) <= step and (options.always or not done.exists()):
            done.touch()
            return str(kind)
    return None


def fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise RuntimeError("what a pity")
    if kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(600)
    if kind == "exit2":
        sys.exit(2)
    if kind == "leave":
        os._exit(0)


if __name__ == "__main__":
    sys.exit(under_supervision(main))
