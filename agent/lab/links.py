# SPDX-License-Identifier: Apache-2.0
"""Named network namespaces, as `ip netns` makes them, and their links, addresses and routes, by pyroute2."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from agent.core.errors import SluiceError
from agent.core.wire.rtnetlink import LOOPBACK_INDEX
from agent.kernel import scratch, sysctl
from agent.kernel.netns import Netns, unpin

if TYPE_CHECKING:
    from pyroute2 import IPRoute  # its import takes up to half a second, which `sluice --help` need not wait for

NETNS_DIR = Path("/run/netns")

# Without duplicate address detection an IPv6 address is usable at once: the lab's addresses cannot clash.
NO_DAD: Final = MappingProxyType({"net/ipv6/conf/all/accept_dad": 0, "net/ipv6/conf/default/accept_dad": 0})
FORWARD: Final = MappingProxyType({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
_IFA_F_NODAD = 0x02  # linux/if_addr.h


@dataclass(frozen=True, slots=True)
class Port:
    """One end of a veth pair: its namespace, its name there, its addresses with their lengths, its default gateways."""

    namespace: str
    name: str = "eth0"
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()


class Links:
    """The links of one namespace, by name. `rtnl` is the socket, for everything that has no method here."""

    def __init__(self, netns: Netns, rtnl: IPRoute) -> None:
        self.rtnl = rtnl
        self._netns = netns

    def index(self, name: str) -> int:
        """Returns the interface's index. Raises SluiceError when it does not exist."""
        found: list[int] = self.rtnl.link_lookup(ifname=name)
        if not found:
            raise SluiceError(f"{self._netns.origin}: no interface {name}")
        return found[0]

    def names(self, kind: str) -> list[str]:
        """Returns the names of all interfaces of a kind, such as veth."""
        return [link.get_attr("IFLA_IFNAME") for link in self.rtnl.get_links(kind=kind)]

    def state(self, name: str) -> str:
        """Returns the operational state: UP, DOWN, LOWERLAYERDOWN (its peer is down) and so on."""
        (link,) = self.rtnl.get_links(self.index(name))
        return str(link.get_attr("IFLA_OPERSTATE"))

    def veth(self, name: str, peer: str, **more: Any) -> None:
        """Adds a pair of which both ends are here and this one is up; `more` are attributes of the peer."""
        self.rtnl.link("add", ifname=name, kind="veth", state="up", peer={"ifname": peer, **more})

    def bridge(self, name: str) -> None:
        self.rtnl.link("add", ifname=name, kind="bridge", br_mcast_snooping=0, state="up")

    def tap(self, name: str) -> None:
        """Adds a device for a virtual machine."""
        self._netns.call(lambda: self.rtnl.link("add", ifname=name, kind="tuntap", mode="tap", ifr={"no_pi": 1}))

    def up(self, name: str, *, master: str = "") -> None:
        more = {"master": self.index(master)} if master else {}
        self.rtnl.link("set", index=self.index(name), state="up", **more)

    def delete(self, name: str) -> None:
        """Removes the interface and its peer; nothing there is fine, also one that ends with its peer's namespace."""
        from pyroute2.netlink.exceptions import NetlinkError

        for index in self.rtnl.link_lookup(ifname=name):
            try:
                self.rtnl.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise

    def add_addresses(self, name: str, *addresses: str) -> None:
        """Adds addresses, such as 10.0.0.1/24, which are usable at once."""
        index = self.index(name)
        for address in addresses:
            self.rtnl.addr("add", index=index, address=address, flags=_IFA_F_NODAD if ":" in address else 0)

    def add_route(self, destination: str, gateway: str) -> None:
        self.rtnl.route("add", dst=destination, gateway=gateway)


@contextlib.contextmanager
def links(namespace: str | Path) -> Iterator[Links]:
    """Opens the links of a namespace, by its name or path.

    Raises SluiceError, also for what the kernel refuses inside the block.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with Netns.open(NETNS_DIR / namespace) as netns, netns.call(IPRoute) as rtnl:
            yield Links(netns, rtnl)
    except NetlinkError as error:
        raise SluiceError(f"rtnetlink in {namespace}: {error.args[1]}") from error


def join(one: Port, other: Port, **more: Any) -> None:
    """Connects two namespaces by a veth pair; `more` are attributes of the other end. Raises SluiceError.

    Both ends are up before they get addresses: otherwise IPv6 takes a second to answer.
    """
    with links(one.namespace) as here, links(other.namespace) as there:
        with Netns.open(NETNS_DIR / other.namespace) as target:
            here.veth(one.name, other.name, net_ns_fd=target.fd, **more)
        there.up(other.name)
        for port, side in ((one, here), (other, there)):
            side.add_addresses(port.name, *port.addresses)
            for gateway in port.gateways:
                side.add_route("default", gateway)


def add_namespace(name: str, sysctls: Mapping[str, int] = MappingProxyType({})) -> None:
    """Makes a named namespace with loopback up, and kernel settings that hold before any interface comes.

    Raises SluiceError.
    """
    from pyroute2 import IPRoute, netns

    def make() -> None:
        # Not netns.create: it forks this process, which takes 15 ms, and longer the larger the process is.
        netns.attach(name, threading.get_native_id())
        for key, value in sysctls.items():
            sysctl.write(key, value)
        with IPRoute() as rtnl:
            rtnl.link("set", index=LOOPBACK_INDEX, state="up")

    try:
        scratch.call(make)
    except OSError as error:
        raise SluiceError(f"{NETNS_DIR / name}: {error.strerror}") from None


def remove_namespace(name: str) -> None:
    """Removes the name; a missing one is fine. A namespace that a process uses lives on without it."""
    # `ip netns del` refuses a file if `ip netns add` was interrupted before mounting it.
    if (NETNS_DIR / name).exists():
        unpin(NETNS_DIR / name)
