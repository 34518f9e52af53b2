"""The order in which files go from host to host."""

import pytest

from megagrow.checkpoint.native.between_hosts import FileTransfer, rounds


@pytest.mark.parametrize(("world", "ahead"), [(2, 1), (8, 2), (9, 4)])
def test_all_hosts_send_at_the_same_time(world, ahead):
    """Each to the next, as in a save: one round, however many there are."""
    assert len(rounds(FileTransfer(r, r, (r + ahead) % world) for r in range(world))) == 1


def test_a_rank_sends_and_receives_one_file_at_a_time():
    transfers = [
        FileTransfer(0, 0, 1),
        FileTransfer(1, 0, 2),
        FileTransfer(2, 3, 1),
        FileTransfer(3, 2, 0),
    ]
    found = rounds(transfers)
    assert len(found) == 2 and {t for turn in found for t in turn} == set(transfers)
    for turn in found:
        assert len({t.sender for t in turn}) == len({t.receiver for t in turn}) == len(turn)
