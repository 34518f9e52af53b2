"""Start-up and exit of a rank: its lifeline and its own log."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

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
        text = f"{type(error).__name__}: {error}"
        usage = isinstance(error, SystemExit) and error.code == 2  # as argparse exits
        lifeline.say("failed", text=text, kind=lifeline.USAGE if usage else "")
        _write_error_file(text)
        raise
    if line is not None:
        if line.last_word is None:
            line.say(_WORDS.get(status, "failed"), text=f"its exit status is {status}")
        line.close()
    return status


def _write_error_file(text: str) -> None:
    """As `torch.distributed.elastic` writes it, for torchrun and the agent to report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
        content = {"message": {"message": text, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
