"""How many nodes a rendezvous waits for."""

from types import SimpleNamespace

import pytest

from megagrow.cluster.hosts import Order
from megagrow.cluster.rendezvous import rendezvous_of


@pytest.mark.parametrize(
    ("connected", "most"), [(None, 8), (3, 3), (1, 2), (9, 8)], ids=["at first", "3", "1", "9"]
)
def test_nodes_that_are_not_connected_are_not_waited_for(connected, most):
    """There is a last call of seconds only while fewer than the greatest number have come."""
    fleet = SimpleNamespace(nodes=(2, 8))
    node = SimpleNamespace(fleet=fleet, here="localhost", join=1.0, line=None)
    handler = rendezvous_of(node, Order(2, None, connected))
    assert (handler.settings.min_nodes, handler.settings.max_nodes) == (2, most)
