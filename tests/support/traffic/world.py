# SPDX-License-Identifier: Apache-2.0
"""The traffic table's world: a pod between a node, a second network and a virtual machine, with listeners everywhere.

vm ── k6t0 ┌─────┐ eth0 ── peer (the node: resolvers, services, the probe addresses, networks behind it)
           │ pod │
           └─────┘ eth1 ── peer
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.rules import Pod
from support.rules import pod as namespace

from agent.core.names import DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, PROBE_IPV4, PROBE_IPV6, ZTUNNEL_MARK
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.links import FORWARD, NO_DAD, Port, join, links

WAIT = 2.0  # seconds until something that should come counts as not come; never waited out where it comes
APP, OTHER = 8080, 9090
FIRST, INSIDE, LAST = 7000, 7005, 7010  # of the excluded range
CRAFTED = (20000, 39999)  # source ports of SYNs that no kernel knows of
# Name -> address in each family. What the pod holds, what the peer holds, the machine behind the pod.
ADDRESSES: dict[str, dict[int, str]] = {
    "pod": {4: "10.77.0.2", 6: "fd77::2"},
    "pod's eth1": {4: "10.77.1.2", 6: "fd77:1::2"},
    "loopback": {4: "127.0.0.1", 6: "::1"},
    "127.0.0.2": {4: "127.0.0.2"},
    "peer": {4: "10.77.0.1", 6: "fd77::1"},
    "peer's eth1": {4: "10.77.1.1", 6: "fd77:1::1"},
    "gateway": {4: "10.77.2.1", 6: "fd77:2::1"},  # the pod's own, towards the machine behind it
    "vm": {4: "10.77.2.2", 6: "fd77:2::2"},
    "probe": {4: PROBE_IPV4, 6: PROBE_IPV6},
    "own probe": {4: "10.88.9.7", 6: "fd88:9::7"},  # where the setting names another one
    "resolver": {4: "10.88.0.53", 6: "fd88::53"},
    "resolver 2": {4: "10.88.0.54", 6: "fd88::54"},
    "net A": {4: "10.88.1.1", 6: "fd88:1::1"},
    "net A's last": {4: "10.88.1.255", 6: "fd88:1::ffff:ffff:ffff:ffff"},
    "net B": {4: "10.88.2.1", 6: "fd88:2::1"},
    "service": {4: "10.96.0.1", 6: "fd96::1"},  # the node sends it on to the peer's APP
    "own service": {4: "10.96.0.2", 6: "fd96::2"},  # the node sends it back to the pod's APP
    "local service": {4: "10.96.0.3", 6: "fd96::3"},  # a foreign rule in the pod sends it on to the peer's APP
}
AT_PEER = ("probe", "own probe", "resolver", "resolver 2", "net A", "net A's last", "net B")
PROXY_PORTS = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT)
TCP_PORTS = (*PROXY_PORTS, APP, OTHER, 53, 80, 6379, FIRST - 1, FIRST, INSIDE, LAST, LAST + 1)
UDP_PORTS = (DNS_PORT, APP, 53, 123, FIRST - 1, FIRST, LAST, LAST + 1)
SCTP = 132
IPV6_TRANSPARENT = 75  # linux/in6.h
BEHIND = {4: "10.77.2.0/24", 6: "fd77:2::/64"}  # the pod: the network of the machine
_SYSCTLS = {**NO_DAD, **FORWARD, "net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/default/rp_filter": 0}

_QUIET = f"""table inet quiet {{
  chain output {{
    type filter hook output priority 0;
    tcp sport {CRAFTED[0]}-{CRAFTED[1]} tcp flags & rst == rst drop
  }}
}}
"""
# What kube-proxy would do on the node; the way back to the pod itself hides the pod's address from it.
_SERVICES = """table inet services {
  chain prerouting {
    type nat hook prerouting priority -100;
    ip daddr 10.96.0.1 dnat to 10.77.0.1
    ip6 daddr fd96::1 dnat to fd77::1
    ip daddr 10.96.0.2 dnat to 10.77.0.2
    ip6 daddr fd96::2 dnat to fd77::2
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    ct status dnat oifname "eth0" masquerade
  }
}
"""
# A cluster-internal proxy of somebody else in the pod, behind our rules.
LOCAL_SERVICE = """table inet foreign {
  chain output {
    type nat hook output priority -90;
    ip daddr 10.96.0.3 dnat to 10.77.0.1
    ip6 daddr fd96::3 dnat to fd77::1
  }
}
"""


@dataclass(frozen=True)
class World:
    pod: Pod
    peer: Pod
    vm: Pod
    sides: dict[str, Side]  # pod, peer, vm

    def place(self, name: str) -> Path:
        return self.sides[name].path


class Side:
    """Listeners in one namespace, which say who got something. Those on the proxy's ports are marked as its are."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.sockets: dict[tuple[str, int], socket.socket] = {}
        with Netns.open(path) as netns:
            for protocol, ports in (("tcp", TCP_PORTS), ("udp", UDP_PORTS)):
                for port in ports:
                    mark = ZTUNNEL_MARK if name == "pod" and port in PROXY_PORTS else 0
                    self.sockets[protocol, port] = netns.call(lambda a=(protocol, port, mark): listener(*a))
            for family in (4, 6):
                self.sockets["sctp", family] = netns.call(lambda f=family: raw(f, SCTP))

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()


def listener(protocol: str, port: int, mark: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)  # as a ztunnel does
    if protocol == "udp":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)  # to answer from where it was asked
    sock.bind(("::", port))
    if protocol == "tcp":
        sock.listen(64)
    sock.setblocking(False)
    return sock


def raw(family: int, protocol: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_RAW, protocol)
    sock.setblocking(False)
    return sock


def opened(path: Path, make: Callable[[], socket.socket]) -> socket.socket:
    with Netns.open(path) as netns:
        return netns.call(make)


@contextlib.contextmanager
def world(families: tuple[int, ...] = (4, 6)) -> Iterator[World]:
    """Without any rules in the pod. `families` are those that the pod has addresses of besides loopback."""
    token = os.urandom(2).hex()
    with contextlib.ExitStack() as made:
        pod, peer, vm = (made.enter_context(namespace(f"slu-tt-{token}{end}", _SYSCTLS)) for end in "apv")
        for device, other, theirs in (("eth0", peer, "eth0"), ("eth1", peer, "eth1"), ("k6t0", vm, "eth0")):
            join(Port(pod.name, device), Port(other.name, theirs))
        for one, places in (
            (pod, {"pod": "eth0", "pod's eth1": "eth1", "gateway": "k6t0"}),
            (peer, {"peer": "eth0", "peer's eth1": "eth1", **dict.fromkeys(AT_PEER, "lo")}),
            (vm, {"vm": "eth0"}),
        ):
            _addressed(one, places, families)
        _routed(pod, peer, vm, families)
        for one, script in ((peer, _QUIET + _SERVICES), (vm, _QUIET)):
            run(["nft", "-f", "-"], netns=one.path, stdin=script)
        sides = {}
        for name, one in (("pod", pod), ("peer", peer), ("vm", vm)):
            sides[name] = Side(name, one.path)
            made.callback(sides[name].close)
        yield World(pod, peer, vm, sides)


def sized(name: str, family: int, device: str = "") -> str:
    """The address with the length that it has on the device."""
    return f"{ADDRESSES[name][family]}/{({4: 32, 6: 128} if device == 'lo' else {4: 24, 6: 64})[family]}"


def _addressed(one: Pod, places: dict[str, str], families: tuple[int, ...]) -> None:
    with links(one.name) as inside:
        for name, device in places.items():
            inside.add_addresses(device, *(sized(name, family, device) for family in families))


def _routed(pod: Pod, peer: Pod, vm: Pod, families: tuple[int, ...]) -> None:
    for one, gateway in ((pod, "peer"), (vm, "gateway"), (peer, "pod")):
        with links(one.name) as inside:
            for family in families:
                inside.add_route(BEHIND[family] if one is peer else "default", ADDRESSES[gateway][family])
