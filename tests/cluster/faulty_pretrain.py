"""launch/pretrain.py with faults injected into ranks, each once.

MEGAGROW_FAULTS is a directory for notes, then `rank:function:count:what`, separated by spaces:
at its count-th call of the megagrow function of that name, the rank is killed (`kill`), pauses for
some seconds (`pause`) or does nothing more (`hang`), after leaving a note of it.  With
`first/function` the calls count from the first call of `first`.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = str(REPOSITORY / "megagrow")


def arm() -> None:
    notes, *faults = os.environ["MEGAGROW_FAULTS"].split()
    for fault in faults:
        rank, function, count, what = fault.split(":")
        note = Path(notes) / fault.translate(str.maketrans(":/", "__"))
        # One at a time, in the given order.
        if not note.exists():
            if rank == os.environ["RANK"]:
                watch_for(function, int(count), what, note)
            return


def watch_for(function: str, left: int, what: str, note: Path) -> None:
    first, _, function = function.rpartition("/")

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left, first
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name == first:
            first = ""
        if code.co_name == function and not first:
            left -= 1
            if left == 0:
                note.touch()
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600 if what == "hang" else 4)

    threading.setprofile(watch)
    sys.setprofile(watch)


if __name__ == "__main__":
    arm()
    runpy.run_path(str(REPOSITORY / "launch" / "pretrain.py"), run_name="__main__")
