"""What the node overrides of PyTorch's elastic agent, which documents no such place, is there."""

import inspect

import pytest

from megagrow.cluster import agent, rendezvous

OVERRIDDEN = {
    agent.Agent: {
        "_invoke_run", "_start_workers", "_shutdown", "_set_local_rank_env",
    },
    rendezvous._Rendezvous: {"_wrap_store", "_create_tcp_store_server"},
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERRIDDEN)
def test_private_methods_that_are_overridden_exist(kind):
    """A release of PyTorch without one of them would call what it has instead, and not ours."""
    inherited = [base for base in kind.__mro__[1:] if base.__module__.startswith("torch.")]
    ours = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    found = {name for name in private if any(name in vars(base) for base in inherited)}
    assert found == OVERRIDDEN[kind]
