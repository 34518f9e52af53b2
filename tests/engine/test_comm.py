"""The ranks of a job."""

import torch

from megagrow.errors import ConfigError, MegagrowError
from tests.ranks import run_ranks


def _reduced(comm):
    """A sum of integers beyond float precision, and a maximum."""
    total = torch.tensor([2**50 + comm.rank, comm.rank * 2])
    comm.reduce(total, operation="sum")
    largest = torch.tensor([comm.rank + 0.5, 1.0], dtype=torch.float64)
    comm.reduce(largest, operation="max")
    return total.tolist(), largest.tolist()


def _collectives(comm):
    assert comm.device == torch.device("cpu") and comm.local_rank == comm.rank
    comm.barrier()
    return {
        "gather": comm.gather({"rank": comm.rank}),
        "all_gather": comm.all_gather(comm.rank * 10),
        "broadcast": comm.broadcast(f"from {comm.rank}"),
        "floats": comm.gather_floats(comm.rank + 0.5),
        "sum": comm.sum_ints(2**40 + comm.rank),
        "reduced": _reduced(comm),
    }


def test_collectives():
    world = 3
    for rank, found in enumerate(run_ranks(world, _collectives)):
        assert found["gather"] == ([{"rank": r} for r in range(world)] if rank == 0 else None)
        assert found["all_gather"] == [0, 10, 20]
        assert found["broadcast"] == "from 0"
        assert found["floats"] == [0.5, 1.5, 2.5]
        assert found["sum"] == 3 * 2**40 + 3
        assert found["reduced"] == ([3 * 2**50 + 3, 6], [2.5, 1.0])


def _ring(comm):
    """Each rank sends to the next; then only rank 0 sends, then none does."""
    to, source = (comm.rank + 1) % comm.world, (comm.rank - 1) % comm.world
    got = torch.zeros(3)
    comm.exchange(send=torch.full((3,), float(comm.rank)), to=to, receive=got, source=source)
    first = torch.zeros(2)
    comm.exchange(
        send=torch.tensor([7.0, 8.0]) if comm.rank == 0 else None, to=to,
        receive=first if comm.rank == 1 else None, source=source,
    )  # fmt: skip
    comm.exchange(send=None, to=to, receive=None, source=source)
    return got.tolist(), first.tolist()


def test_exchange():
    found = run_ranks(4, _ring)
    assert [got for got, _ in found] == [[float((r - 1) % 4)] * 3 for r in range(4)]
    assert [first for _, first in found] == [[0.0, 0.0], [7.0, 8.0], [0.0, 0.0], [0.0, 0.0]]


def _agree(comm, failures):
    failure = failures.get(comm.rank)
    try:
        comm.agree(failure)
    except Exception as error:
        return type(error), str(error), error is failure
    return None


def test_agree_raises_on_all_or_none():
    assert run_ranks(2, _agree, {}) == [None, None]
    user_error = run_ranks(2, _agree, {1: ConfigError("bad key")})
    assert user_error == [(ConfigError, "bad key", False), (ConfigError, "bad key", True)]
    defect = run_ranks(2, _agree, {1: KeyError("x")})
    assert defect[0] == (MegagrowError, "rank 1 failed: KeyError: 'x'", False)
    assert defect[1][0] is KeyError
