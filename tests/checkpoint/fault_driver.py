"""Runs under the preloaded fault shim: saves step 41 once per fault, each in a forked child.

Usage: python -m tests.checkpoint.fault_driver DIRECTORY WORLD

Standard input is a JSON list of faults, each a dictionary of FAULT_* variables.  Save
number i goes to DIRECTORY/i, which already holds a checkpoint of step 40.  Prints a JSON list of
`[exit status or -signal, calls seen, text]`.  Forking saves the seconds that importing torch takes.
"""

import json
import os
import sys
from pathlib import Path

from tests.checkpoint.worlds import random_cuts, random_values, save_outcomes


def child(root: Path, world: int, fault: dict[str, str], log: int, text: int) -> None:
    os.environ.update(fault, FAULT_LOG=str(log))
    outcomes = save_outcomes(root, 41, random_cuts(random_values(41), world, 41))
    del os.environ["FAULT_CALL"]
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
    assert len(set(errors)) <= 1 and len(errors) in (0, world), "ranks disagree"
    os.write(text, (errors or [""])[0].encode())
    os._exit(3 if errors else 0)


def main() -> None:
    base, world = Path(sys.argv[1]), int(sys.argv[2])
    results = []
    for number, fault in enumerate(json.load(sys.stdin)):
        log_end, log = os.pipe()
        text_end, text = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(base / str(number), world, fault, log, text)
            finally:
                os._exit(99)
        os.close(log)
        os.close(text)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        calls = os.read(log_end, 1 << 16).decode()
        results.append([status, calls, os.read(text_end, 1 << 16).decode()])
        os.close(log_end)
        os.close(text_end)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
