"""Start-up and exit of a rank: its lifeline and its own log."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megagrow.cluster import lifeline, ranklog
from megagrow.errors import MegagrowError

_WORDS = {
    0: "done",
    lifeline.STATUS_STOPPED: "stopped",
    lifeline.STATUS_INTERRUPTED: "stopped",
}


def under_supervision(main: Callable[[], int]) -> int:
    """Run a rank's `main`, and report its outcome to the job's supervisor, if there is one."""
    try:
        line = lifeline.Lifeline.from_environment()
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ranklog.divert_output()
    try:
        status = main()
    except BaseException as error:
        lifeline.say("failed", text=f"{type(error).__name__}: {error}")
        raise
    if line is not None:
        if line.last_word is None:
            line.say(_WORDS.get(status, "failed"), text=f"its exit status is {status}")
        line.close()
    return status
