"""Addresses, interfaces and ports of this machine."""

import socket

import pytest

from megagrow.cluster import network
from megagrow.errors import ConfigError, MegagrowError


def test_toward_this_host_itself():
    assert network.own_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.address_for(["localhost"]) == "127.0.0.1"


def test_names_that_resolve_to_nothing():
    assert network.addresses_of("no-such-host.invalid") == []
    assert network.own_address("no-such-host.invalid") is None
    assert network.interface_of("192.0.2.77") is None
    with pytest.raises(ConfigError, match=r"no host of the job can be found(.|\n)*no-such"):
        network.address_for(["no-such-host.invalid"])


def test_master_address_is_not_loopback_for_others(monkeypatch):
    names = {"h0": ["127.0.1.1"], "h1": ["10.1.1.2"]}
    monkeypatch.setattr(network, "addresses_of", lambda host: names.get(host, []))
    monkeypatch.setattr(network, "own_address", lambda toward: {"h1": "10.1.1.1"}.get(toward))
    assert network.master_address("h0", ["h1"]) == "10.1.1.1"
    assert network.master_address("h0", []) == "127.0.1.1"
    assert network.master_address("h1", ["h0"]) == "10.1.1.2"


ONE_OF_TWO = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.1.1.2", "RANK": "1"}


@pytest.fixture
def debian(monkeypatch):
    """A host whose name resolves to its loopback address, with a route to the others."""
    names = {socket.gethostname(): ["127.0.1.1"], "10.1.1.2": ["10.1.1.2"]}
    monkeypatch.setattr(network, "addresses_of", lambda host: names.get(host, []))
    monkeypatch.setattr(network, "own_address", lambda toward: "10.1.1.1")
    monkeypatch.setattr(network, "interface_of", {"10.1.1.1": "eth7"}.get)
    return names


def test_gloo_gets_the_interface_of_the_route(debian):
    environ = dict(ONE_OF_TWO)
    assert network.choose_gloo_interface(environ) == "eth7" == environ["GLOO_SOCKET_IFNAME"]
    del debian[socket.gethostname()]  # a name that does not resolve at all
    assert network.choose_gloo_interface(dict(ONE_OF_TWO)) == "eth7"
    debian[socket.gethostname()] = ["10.9.9.9"]  # the address of another host
    assert network.choose_gloo_interface(dict(ONE_OF_TWO)) == "eth7"


def test_gloo_is_left_alone(debian):
    users = {**ONE_OF_TWO, "GLOO_SOCKET_IFNAME": "ib0"}
    assert network.choose_gloo_interface(users) is None and users["GLOO_SOCKET_IFNAME"] == "ib0"
    assert network.choose_gloo_interface({**ONE_OF_TWO, "LOCAL_WORLD_SIZE": "4"}) is None
    assert network.choose_gloo_interface({}) is None
    debian[socket.gethostname()] = ["10.1.1.1"]
    assert network.choose_gloo_interface(dict(ONE_OF_TWO)) is None


def test_no_way_to_the_others(debian, monkeypatch):
    monkeypatch.setattr(network, "own_address", lambda toward: "127.0.1.1")
    monkeypatch.setattr(network, "_interfaces", lambda: [("lo", "127.0.0.1"), ("a", "10.0.0.1")])
    assert network.choose_gloo_interface(dict(ONE_OF_TWO)) == "a"
    monkeypatch.setattr(network, "only_interface", lambda: None)
    with pytest.raises(MegagrowError, match="no network interface leads to rank 0's host"):
        network.choose_gloo_interface(dict(ONE_OF_TWO))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(MegagrowError, match=f"port {port} cannot be had"):
            network.require_free_port({"RANK": "0", "MASTER_PORT": port})
        network.require_free_port({"RANK": "1", "MASTER_PORT": port})
        network.require_free_port(
            {"RANK": "0", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        )
    network.require_free_port({"RANK": "0", "MASTER_PORT": port})


def test_the_address_to_listen_on(monkeypatch):
    assert network.address_of_name("localhost") in ("127.0.0.1", "::1")
    assert network.address_of_name("127.0.0.1") == "127.0.0.1"
    names = {"h0": ["127.0.1.1"], "h1": ["10.1.1.2"]}
    monkeypatch.setattr(network, "addresses_of", lambda host: names.get(host, []))
    monkeypatch.setattr(network, "_interfaces", lambda: [("lo", "127.0.0.1"), ("a", "10.1.1.1")])
    assert network.address_of_name("h0") == "10.1.1.1"
    assert network.address_of_name("h1") == "10.1.1.2"
    more = [("lo", "127.0.0.1"), ("a", "10.1.1.1"), ("b", "10.2.1.1")]
    monkeypatch.setattr(network, "_interfaces", lambda: more)
    with pytest.raises(ConfigError, match=r"10\.1\.1\.1, 10\.2\.1\.1(.|\n)*--address"):
        network.address_of_name("h0")


def test_which_host_this_is():
    assert network.is_here("localhost") and network.is_here("127.0.0.1")
    assert not network.is_here("192.0.2.77") and not network.is_here("no-such-host.invalid")
