"""Heartbeats to NVIDIA's resiliency extension, for a rank that its `ft_launcher` started.

The launcher starts a monitor beside each rank and names its socket in the rank's environment; it
ends a rank whose main thread sends nothing for `--ft-rank-heartbeat-timeout` seconds, and restarts
the job.  A rank sends whenever something begins: a micro-batch, a validation, a save, a growth.
(nvidia-resiliency-ext, `fault_tolerance.RankMonitorClient`; tried with 0.4.1.)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"  # set by ft_launcher for each rank
_LEAST_SECONDS = 1.0  # between two heartbeats: each waits for the monitor's answer


class Heartbeats:
    """A rank's heartbeats; without a monitor nothing is sent.

    Args:
        client: a connected `RankMonitorClient`, or None.
        say: called once if the monitor does not answer any more.
    """

    def __init__(self, client: Any, say: Callable[[str], object]) -> None:
        self._client, self._say, self._next = client, say, 0.0

    def send(self) -> None:
        """Send one, unless the last is recent; called by the main thread, whose hangs it shows."""
        now = time.monotonic()
        if self._client is None or now < self._next:
            return
        self._next = now + _LEAST_SECONDS
        try:
            self._client.send_heartbeat()
        except Exception as error:  # the extension raises errors of several kinds
            self._client = None
            self._say(f"the monitor of ft_launcher does not answer; no more heartbeats: {error}")


@contextlib.contextmanager
def heartbeats(say: Callable[[str], object]) -> Iterator[Heartbeats]:
    """Connect to this rank's monitor, if ft_launcher started one.

    Args:
        say: called with what is connected, or why it cannot be.
    """
    client = _connected(say) if VARIABLE in os.environ else None
    try:
        yield Heartbeats(client, say)
    finally:
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown_workload_monitoring()


def _connected(say: Callable[[str], object]) -> Any:
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        client = RankMonitorClient()
        client.init_workload_monitoring()
    except Exception as error:  # as above; training is possible without it
        say(f"warning: no heartbeats to ft_launcher ({VARIABLE} is set): {error}")
        return None
    say("heartbeats go to the monitor of ft_launcher")
    return client
