# SPDX-License-Identifier: Apache-2.0
"""Our netlink code against pyroute2, which knows the same messages independently, in one scratch namespace.

iproute2 makes the objects, so neither reader reads what it wrote itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.diag import DiagSocket
from pyroute2.nftables.main import NFTables

from agent.core.wire.netlink import attributes, unpack_text
from agent.core.wire.nftables import GETCHAIN, GETTABLE
from agent.kernel import scratch
from agent.kernel.exec import run
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.netlink.sock_diag import SockDiag

pytestmark = pytest.mark.root
T = TypeVar("T")
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
LINKS = """
link set lo up
link add v0 type veth peer name v1
link set v1 up
link set v0 up
link add d0 type veth peer name d1
link set d1 up
link set d0 up
link add br7 type bridge
"""
ADDRESSES = """
addr add 10.77.0.1/24 dev v0
addr add 10.77.0.1/32 dev v1
addr add 2001:db8:7::1/64 dev v0 nodad
addr add 192.0.2.5 peer 192.0.2.6 dev d0
"""
ROUTES = """
route add 10.9.0.0/16 via 10.77.0.2 metric 50
route add 10.9.0.0/16 dev d0 metric 10
route add blackhole 10.10.0.0/16
route add local 0.0.0.0/0 dev lo table 100
route add 172.16.0.1 dev v0 table 300
route add default via 10.77.0.2 table 100000
-6 route add 2001:db8:9::/48 via 2001:db8:7::2
-6 route add default dev d0
"""
RULES = """
rule add fwmark 0x111/0xfff lookup 100 pref 32764
rule add iif eth9 lookup 77 pref 100
rule add to 10.1.2.3 lookup 300 pref 512
rule add from 10.0.0.0/8 to 192.0.2.0/24 tos 0x10 lookup 5000 pref 600
rule add not fwmark 0x5 lookup 7 pref 601
rule add uidrange 1000-2000 ipproto tcp dport 80-90 lookup 8 pref 602
rule add suppress_prefixlength 0 lookup main pref 603
rule add iif lo oif lo blackhole pref 604
rule add fwmark 0xabc lookup 100000 pref 605
rule add pref 700 goto 32764
rule add ipproto udp sport 53 lookup 9 pref 613
rule add protocol 83 iif lo lookup 255 pref 614
-6 rule add to 2001:db8::5 lookup 9 pref 610
-6 rule add from 2001:db8::/32 unreachable pref 611
-6 rule add iif a-very-long-15c lookup 70000 pref 612
-6 rule add fwmark 0x111/0xfff lookup 100 pref 32764
"""
TABLES = """
add table inet mine
add chain inet mine out { type filter hook output priority 0; policy accept; }
add rule inet mine out tcp dport 99 counter accept
add table ip6 other
add chain ip6 other plain
"""


def inside(commands: str, read: Callable[[], T]) -> T:
    """Returns what `read` returns in a new namespace after these commands of ip."""

    def both() -> T:
        lines = commands.strip().splitlines()
        six = [one.removeprefix("-6 ") for one in lines if one.startswith("-6 ")]
        run(["ip", "-batch", "-"], stdin="\n".join(one for one in lines if not one.startswith("-6 ")) + "\n")
        run(["ip", "-6", "-batch", "-"], stdin="\n".join(six) + "\n")
        return read()

    return scratch.call(both)


def every(read: Callable[[IPRoute], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Returns each message that pyroute2 reads, with its attributes by name."""
    with IPRoute() as route:
        return [(one, dict(one["attrs"])) for one in read(route)]


def unmapped(address: str) -> str:
    """Returns the address, of IPv4 where it is IPv4 on a socket of IPv6."""
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def test_policy_rules() -> None:
    def read() -> tuple[set[object], set[object]]:
        with closing(RouteSocket()) as route:
            own = {
                (
                    *(one.family, one.preference, one.action, one.table, one.mark, one.mask, one.inverted),
                    *(one.iif, one.oif, one.protocol, one.goto),
                )
                for one in route.rules(ipv6=True)
            }
        theirs = {
            (
                *(family, parts.get("FRA_PRIORITY", 0), one["action"], parts.get("FRA_TABLE") or one["table"]),
                *(parts.get("FRA_FWMARK", 0), parts.get("FRA_FWMASK", 0), bool(one["flags"] & 2)),
                *(parts.get("FRA_IIFNAME", ""), parts.get("FRA_OIFNAME", "")),
                *(int(parts.get("FRA_PROTOCOL", 0)), parts.get("FRA_GOTO", 0)),
            )
            for family, number in FAMILIES.items()
            for one, parts in every(lambda route, number=number: route.get_rules(family=number))  # type: ignore[misc]
        }
        return own, theirs

    own, theirs = inside(RULES, read)
    assert own == theirs
    assert len(own) == len(RULES.strip().splitlines()) + 5  # and those that every namespace has


def test_links_and_addresses() -> None:
    def read() -> Iterator[tuple[set[object], set[object]]]:
        with closing(RouteSocket()) as route:
            links = {(one.index, one.name, one.up, one.bridge) for one in route.links()}
            addresses = {(str(one.address), one.index) for one in route.held_addresses()}
        theirs = {
            (
                *(one["index"], parts["IFLA_IFNAME"], bool(one["flags"] & 1)),
                "bridge" in dict(parts.get("IFLA_LINKINFO", {"attrs": ()})["attrs"]).values(),
            )
            for one, parts in every(lambda route: route.get_links())
            if parts["IFLA_IFNAME"] != "lo"
        }
        yield links, theirs
        yield (
            addresses,
            {
                (parts.get("IFA_LOCAL") or parts["IFA_ADDRESS"], one["index"])
                for one, parts in every(lambda route: route.get_addr())
            },
        )

    for own, theirs in inside(LINKS + ADDRESSES, lambda: list(read())):
        assert own == theirs and len(own) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_routes(family: int) -> None:
    def read() -> tuple[set[object], set[object], list[set[tuple[str, int]]]]:
        number = FAMILIES[family]
        with closing(RouteSocket()) as route:
            own: set[object] = {(str(one.network), one.index, one.metric) for one in route.main_routes(family)}
            single = set(route.host_routes(family, 300))
        theirs: set[object] = {
            (
                str(ipaddress.ip_network((parts.get("RTA_DST") or str(any_), one["dst_len"]))),
                *(parts.get("RTA_OIF", 0), parts.get("RTA_PRIORITY", 0)),
            )
            for any_ in [ipaddress.ip_address(bytes(4 if family == 4 else 16))]
            for one, parts in every(lambda route: route.get_routes(family=number, table=254))
        }
        found = {
            (parts["RTA_DST"], parts["RTA_OIF"])
            for _, parts in every(lambda route: route.get_routes(family=number, table=300))
        }
        return own, theirs, [single, found]

    own, theirs, single = inside(LINKS + ADDRESSES + ROUTES, read)
    assert own == theirs and len(own) > 2
    assert single[0] == single[1] and len(single[0]) == (family == 4)


def test_tcp_sockets() -> None:
    def read() -> tuple[set[object], set[object]]:
        with ExitStack() as stack:
            for family, host in ((socket.AF_INET, "10.77.0.1"), (socket.AF_INET6, "::")):
                server = stack.enter_context(socket.socket(family))
                server.bind((host, 0))
                server.listen()
                target = "127.0.0.1" if host == "::" else host  # the second: IPv4 on a socket of IPv6
                stack.enter_context(socket.create_connection((target, server.getsockname()[1])))
            with closing(SockDiag()) as diag:
                own: set[object] = {(*one.local, *one.remote, one.state.value, one.inode) for one in diag.both()}
            reader = stack.enter_context(closing(DiagSocket()))
            reader.bind()
            names = ("idiag_src", "idiag_sport", "idiag_dst", "idiag_dport", "idiag_state", "idiag_inode")
            theirs: set[object] = {
                (unmapped(row[0]), row[1], unmapped(row[2]), *row[3:])
                for number in FAMILIES.values()
                for row in ([one[name] for name in names] for one in reader.get_sock_stats(family=number))
            }
        return own, theirs

    own, theirs = inside(LINKS + ADDRESSES, read)
    assert own == theirs and len(own) == 6


def test_nf_tables_tables_and_chains() -> None:
    def read() -> tuple[set[object], set[object]]:
        run(["nft", "-f", "-"], stdin=TABLES)
        with closing(NftSocket()) as nft:
            own: set[object] = set()
            for kind, keys in ((GETTABLE, (1,)), (GETCHAIN, (1, 3))):
                for message in nft.dump(kind, 0):
                    parts = dict(attributes(message.body[4:]))
                    own.add((message.body[0], *(unpack_text(parts.get(key)) for key in keys)))
        with NFTables(nfgen_family=socket.AF_UNSPEC) as reader:
            tables = {(one["nfgen_family"], one.get_attr("NFTA_TABLE_NAME")) for one in reader.get_tables()}
            chains = {
                (one["nfgen_family"], one.get_attr("NFTA_CHAIN_TABLE"), one.get_attr("NFTA_CHAIN_NAME"))
                for one in reader.get_chains()
            }
        return own, {*tables, *chains}

    own, theirs = inside("", read)
    assert own == theirs and len(own) == 4
