"""The helper for jobs of several processes."""

import os
import time

import pytest

from tests.ranks import run_ranks


def _sum(comm, offset):
    return comm.rank, comm.world, comm.sum_ints(comm.rank + offset), os.getpid()


def _fail_on(comm, bad):
    if comm.rank == bad:
        raise ValueError("a bad rank")
    comm.barrier()


def _vanish_on(comm, bad):
    if comm.rank == bad:
        os._exit(7)
    comm.barrier()


def _hang(comm):
    if comm.rank == 1:
        time.sleep(1000)


@pytest.mark.parametrize("world", [1, 4, 2, 3])
def test_results_come_by_rank(world):
    results = run_ranks(world, _sum, 10)
    expected = sum(range(world)) + 10 * world
    assert [r[:3] for r in results] == [(rank, world, expected) for rank in range(world)]
    assert len({r[3] for r in results} | {os.getpid()}) == world + 1


def test_a_failure_names_its_rank():
    with pytest.raises(AssertionError, match=r"rank 2 failed(.|\n)*ValueError: a bad rank"):
        run_ranks(3, _fail_on, 2)


def test_a_vanished_rank_is_named():
    with pytest.raises(AssertionError, match="rank 1 failed:\nthe process ended"):
        run_ranks(2, _vanish_on, 1)


def test_a_hanging_rank_ends_the_job():
    said = r"no answer from ranks \[1\](.|\n)*rank 0 answered: None\n(.|\n)*in _hang\n"
    with pytest.raises(AssertionError, match=said):
        run_ranks(2, _hang, timeout=8.0)  # rank 0 must have answered, on a busy machine too
