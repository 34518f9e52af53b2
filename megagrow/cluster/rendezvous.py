"""PyTorch's rendezvous of nodes, with its state where only members of the job can write."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
)

from megagrow.cluster.hosts import Fleet, Order
from megagrow.cluster.hub import listen
from megagrow.cluster.lifeline import Lifeline

_POLL_SECONDS = 0.1
_SUPERVISOR_FIRST = 60.0  # until the rendezvous gives up as well
# For further nodes, once there are enough: at first they may be slow to come, later all that are
# left get the order at once.  One that comes later makes all save and start again.
_LAST_CALL = (30.0, 3.0)


class OverError(RendezvousError):
    """The supervisor has ended the attempt, or is gone."""


class _Participant(Protocol):
    """A node, as its rendezvous sees it."""

    line: Lifeline
    fleet: Fleet
    here: str
    join: float

    def over(self, number: int) -> bool:
        """Whether an attempt is over."""


class _Rendezvous(DynamicRendezvousHandler):
    """PyTorch's rendezvous, with our store for the nodes and its own for the ranks."""

    def _wrap_store(self, store: Any) -> Any:
        return store

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> Any:
        listener = listen(master_addr, 0)  # TCPStore's own would listen on all interfaces
        port = int(listener.getsockname()[1])
        return dist.TCPStore(  # type: ignore[attr-defined]
            master_addr, port, is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip


class _Store:
    """The part of `torch.distributed.Store` that the elastic agent uses, over the lifeline."""

    def __init__(self, node: _Participant, order: Order) -> None:
        self._node, self._number = node, order.number
        self._prefix = f"attempt {order.number}/"

    def set(self, key: str, value: bytes | str) -> None:
        """Set a value."""
        self.multi_set([key], [value])

    def get(self, key: str) -> bytes:
        """The value of a key, once it is set."""
        return self.multi_get([key])[0]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        """Set several."""
        texts = [v.decode() if isinstance(v, bytes) else v for v in values]
        named = dict(zip([self._prefix + key for key in keys], texts, strict=True))
        self.ask("set", values=named)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of several keys, once they are all set."""
        names = [self._prefix + key for key in keys]
        while None in (values := self.ask("get", keys=names)["values"]):
            time.sleep(_POLL_SECONDS)
        return [str(value).encode() for value in values]

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """Ask the supervisor; raises OverError if the attempt is over."""
        if self._node.over(self._number):
            raise OverError(f"attempt {self._number} is over")
        try:
            return self._node.line.ask(question, **fields)
        except OSError as error:
            raise OverError(str(error)) from error


class _Backend(RendezvousBackend):
    """Keeps the state of a rendezvous, a pickle, where only members of the job can write."""

    def __init__(self, store: _Store, order: Order) -> None:
        self._store, self._key = store, f"rendezvous {order.number}"

    @property
    def name(self) -> str:
        return "megagrow"

    def get_state(self) -> tuple[bytes, Any] | None:
        return self._state(self._store.ask("get", keys=[self._key])["values"][0])

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        text = base64.b64encode(state).decode()
        answer = self._store.ask("swap", key=self._key, expected=token, value=text)
        found = self._state(answer["value"])
        return None if found is None else (*found, bool(answer["swapped"]))

    def _state(self, text: str | None) -> tuple[bytes, Any] | None:
        return None if text is None else (base64.b64decode(text), text)


def rendezvous_of(node: _Participant, order: Order) -> _Rendezvous:
    """The rendezvous of an attempt."""
    store = _Store(node, order)
    least, most = node.fleet.nodes
    handler = _Rendezvous.from_backend(
        run_id=f"megagrow-{order.number}",
        store=store,  # type: ignore[arg-type]
        backend=_Backend(store, order),
        min_nodes=least,
        max_nodes=most,
        local_addr=node.here,
        timeout=RendezvousTimeout(
            join=timedelta(seconds=node.join + _SUPERVISOR_FIRST),
            last_call=timedelta(seconds=_LAST_CALL[min(order.number - 1, 1)]),
        ),
        # By the hosts' clocks, which may differ; lost nodes are found by their lifelines.
        keep_alive_max_attempt=24,
    )
    assert isinstance(handler, _Rendezvous)
    return handler
