"""Find the address and the interface that lead from here to the other hosts."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

from megagrow.cluster.environment import ranks_here
from megagrow.errors import ConfigError, MegagrowError

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def addresses_of(host: str) -> list[str]:
    """What a name resolves to; empty if it does not."""
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return []


def is_loopback(address: str) -> bool:
    """Whether an address never leaves its host."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_address(toward: str) -> str | None:
    """This host's address on the route to another one; None without a route.

    Toward this host itself it is the address that was given, preferably one that others can
    reach as well.
    """
    loopback = None
    for address in addresses_of(toward):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # on a datagram socket: selects the route, sends nothing
            mine = str(probe.getsockname()[0])
            if not is_loopback(mine):
                return mine
            loopback = loopback or mine
    return loopback


def is_here(host: str) -> bool:
    """Whether a name or an address is this host's."""
    return any(own_address(address) in (address, "127.0.0.1") for address in addresses_of(host))


def address_of_name(host: str) -> str:
    """The address of this host to listen on, from the name by which others reach it.

    Raises:
        ConfigError: the name leads to no address that they can reach.
    """
    found = addresses_of(host)
    good = [address for address in found if not is_loopback(address)]
    if good or host == "localhost" or host in found:
        return (good or found)[0]
    # As Debian's installer leaves it: the own name is 127.0.1.1 in /etc/hosts.
    only = [address for _, address in _interfaces() if not is_loopback(address)]
    if len(only) != 1:
        raise ConfigError(
            f"the address of {host}, by which the other nodes reach this one",
            found=f"the name resolves to {', '.join(found) or 'nothing'} here, and this host has "
            f"the addresses {', '.join(only) or 'none'}",
            expected="one address that the others can reach",
            fix="give it by --address, or fix /etc/hosts",
        )
    return only[0]


def interface_of(address: str) -> str | None:
    """The network interface with one of this host's addresses."""
    if ":" in address:
        return _interface_of_ipv6(address)
    return next((name for name, has in _interfaces() if has == address), None)


def only_interface() -> str | None:
    """The only non-loopback interface, if there is exactly one."""
    names = [name for name, address in _interfaces() if not is_loopback(address)]
    return names[0] if len(names) == 1 else None


def _interfaces() -> list[tuple[str, str]]:
    """All interfaces that have an IPv4 address, with the address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                found.append((name, socket.inet_ntoa(answer[20:24])))
    return found


def _interface_of_ipv6(address: str) -> str | None:
    wanted = ipaddress.IPv6Address(address.partition("%")[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if ipaddress.IPv6Address(int(digits, 16)) == wanted:
                return name
    return None


def free_port() -> int:
    """A port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def choose_gloo_interface(environ: MutableMapping[str, str]) -> str | None:
    """Set GLOO_SOCKET_IFNAME if gloo would bind an address that other hosts cannot reach.

    Gloo binds what the host's own name resolves to.  If that is the loopback address (as
    Debian's installer writes it into /etc/hosts), an address that this host does not have, or
    nothing, ranks on other hosts wait for it in vain.

    Returns:
        The interface, or None if nothing had to be done: a single host, the user's own setting, or
        a name that resolves correctly.

    Raises:
        MegagrowError: no interface leads to MASTER_ADDR.
    """
    here = ranks_here(environ)
    if "GLOO_SOCKET_IFNAME" in environ or here is None or str(here) == environ.get("WORLD_SIZE"):
        return None
    found = addresses_of(socket.gethostname())
    if found and not is_loopback(found[0]) and interface_of(found[0]):
        return None
    master = environ["MASTER_ADDR"]
    address = own_address(master)
    leads = address is not None and not is_loopback(address)
    name = interface_of(address) if address is not None and leads else only_interface()
    if name is None:
        raise MegagrowError(
            f"rank {environ.get('RANK', '0')} on {socket.gethostname()}: no network interface "
            f"leads to rank 0's host, {master}",
            found=f"the route's own address is {address}, the host name resolves to "
            f"{', '.join(found) or 'nothing'}",
            expected="an interface whose address the other hosts can reach",
            fix="set GLOO_SOCKET_IFNAME, or fix /etc/hosts or the address of rank 0's host",
        )
    environ["GLOO_SOCKET_IFNAME"] = name
    return name


def address_for(hosts: list[str]) -> str:
    """This host's address as the hosts of a job see it.

    Raises:
        ConfigError: none of them can be resolved.
    """
    loopback = None
    for host in hosts:
        address = own_address(host)
        if address is not None and not is_loopback(address):
            return address
        loopback = loopback or address
    if loopback is None:
        raise ConfigError(
            f"no host of the job can be found from {socket.gethostname()}",
            found=f"{', '.join(hosts[:4])}: no address, or no route to it",
            expected="names that resolve, or addresses",
            fix="fix /etc/hosts or DNS, or give --address, which the ranks reach this host by",
        )
    return loopback


def master_address(host: str, others: list[str]) -> str:
    """An address of rank 0's host that the other hosts can reach.

    Its name may resolve to the loopback address here, if the job is started from that host.
    """
    found = addresses_of(host)
    good = [address for address in found if not is_loopback(address)]
    if good or not others:
        return (good or found or [host])[0]
    return address_for(others)


def require_free_port(environ: MutableMapping[str, str]) -> None:
    """Reject a port for rank 0 that another job on this host uses: its ranks would join ours.

    Raises:
        MegagrowError: the port is in use.
    """
    if environ.get("RANK", "0") != "0" or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun's agent listens there for its ranks
    port = environ.get("MASTER_PORT")
    if port is None:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except OSError as error:
        raise MegagrowError(
            f"rank 0 on {socket.gethostname()}: port {port} cannot be had",
            found=error.strerror or error,
            expected="a port of this job alone: the ranks of two jobs on one port would mix",
            fix="choose another by --master_port (deepspeed) or --master-port (torchrun), or "
            "start by launch/supervise.py, which finds a free one",
        ) from error
