# SPDX-License-Identifier: Apache-2.0
"""From intent and wiring to map entries: exactly what was asked for, told apart by its id."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import InterfaceRole, PodFlag, PolicyKind, Prefix
from agent.backends.ebpf.compiling import Entries, entries, policy, split
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.topology import Link, PodTopology, Route

COOKIE = 4711
POD4, POD6, LINK6 = IPv4Address("10.0.0.5"), IPv6Address("fd00::5"), IPv6Address("fe80::5")
WIRING = PodTopology(
    links=(Link(2, "eth0"), Link(3, "eth1"), Link(4, "k6t0")),
    addresses=(IPv4Address("127.0.0.1"), IPv6Address("::1"), POD4, LINK6, POD6, IPv4Address("10.1.0.5")),
    routes=(
        Route(ip_network("0.0.0.0/0"), 2, 0),
        Route(ip_network("10.1.0.0/24"), 3, 0),
        Route(ip_network("10.1.0.0/24"), 2, 100),
        Route(ip_network("::/0"), 3, 0),
    ),
)


def compiled(redirect: Redirect = Redirect(), wiring: PodTopology = WIRING, cookie: int = COOKIE) -> Entries:  # noqa: B008
    return entries(redirect, wiring, cookie)


def excluding(**exclude: Any) -> Redirect:
    return Redirect(exclude=Exclusions(**exclude))


def verdict(found: Entries, kind: PolicyKind, value: bytes, none: int = 0) -> int:
    """As the kernel's longest prefix match answers it, after the programs' look at `has`."""
    if not found.pod.has & 1 << kind:
        return none
    fitting = [one for one in found.prefixes if one.kind == kind and bits(one.value, one.bits) == bits(value, one.bits)]
    return max(fitting, key=lambda one: one.bits).verdict if fitting else none


def bits(value: bytes, count: int) -> int:
    return int.from_bytes(value, "big") >> (128 - count)


def number(value: int, width: int) -> bytes:
    return value.to_bytes(width // 8, "big").ljust(16, b"\0")


# --- ranges


@given(st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(sorted))
@example([0, 65535])
@example([0, 0])
@example([65535, 65535])
@example([1, 65534])
def test_a_range_becomes_prefixes_of_exactly_its_numbers(ends: list[int]) -> None:
    first, last = ends
    found = list(split((first, last), 16))
    numbers = [n for start, size in found for n in range(start, start + (1 << (16 - size)))]
    assert numbers == list(range(first, last + 1)), "each once, none besides"
    assert all(start % (1 << (16 - size)) == 0 for start, size in found), "a prefix begins where it can"
    assert len(found) <= 30


@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)).map(sorted))
@example([0, 2**32 - 1])
def test_ranges_of_32_bits_join_without_gaps(ends: list[int]) -> None:
    at = ends[0]
    for start, size in split((ends[0], ends[1]), 32):
        assert start == at and 0 <= size <= 32 and start % (1 << (32 - size)) == 0
        at += 1 << (32 - size)
    assert at == ends[1] + 1


@given(
    st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda ends: tuple(sorted(ends))),
    st.integers(0, 65535),
)
def test_ports_and_users_in_the_maps(ends: tuple[int, int], asked: int) -> None:
    found = compiled(excluding(outbound_ports=(ends,), inbound_ports=(), users=(ends,)))
    inside = ends[0] <= asked <= ends[1]
    assert verdict(found, PolicyKind.PORT_OUT, number(asked, 16)) == inside
    assert verdict(found, PolicyKind.USER, number(asked, 32)) == inside
    assert verdict(found, PolicyKind.PORT_IN, number(asked, 16)) == 0


# --- networks

_v4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda n: str(ip_network(n, strict=False)))
_v6 = st.tuples(st.integers(2**32, 2**128 - 1), st.integers(0, 128)).map(lambda n: str(ip_network(n, strict=False)))
_addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(st.lists(st.one_of(_v4, _v6, st.sampled_from(["::/0", "0.0.0.0/0", "::/8"])), max_size=6), _addresses)
@example(["::/0"], IPv4Address("1.2.3.4"))
@example(["::/0", "0.0.0.0/0"], IPv4Address("1.2.3.4"))
@example(["::/1"], IPv4Address("1.2.3.4"))
@example(["::/80"], IPv4Address("1.2.3.4"))
def test_networks_in_the_maps(networks: list[str], asked: Any) -> None:
    """IPv4 lives inside of IPv6 there, and yet no network of one family has the other's addresses in it."""
    if asked.version == 6 and asked.ipv4_mapped:
        return  # no packet carries it; for a socket it means IPv4
    ordered = tuple(sorted(set(networks)))
    found = compiled(excluding(outbound_networks=ordered, inbound_networks=ordered))
    wanted = any(asked in ip_network(one) for one in networks)
    assert verdict(found, PolicyKind.TO, abi.address(asked)) == wanted
    assert verdict(found, PolicyKind.FROM, abi.address(asked)) == wanted


def test_what_an_excluded_interface_leads_to() -> None:
    found = compiled(excluding(interfaces=("eth1",)))
    for text, there in (("10.1.0.9", 1), ("10.9.9.9", 0), ("fd99::1", 1)):
        assert verdict(found, PolicyKind.ROUTE, abi.address(ip_address(text))) == there, text
    assert verdict(found, PolicyKind.INTERFACE, number(3, 32)) == InterfaceRole.EXCLUDED
    assert verdict(found, PolicyKind.INTERFACE, number(2, 32)) == InterfaceRole.NONE


def test_ipv6_by_an_excluded_interface_says_nothing_of_ipv4() -> None:
    wiring = replace(WIRING, routes=(Route(ip_network("::/0"), 3, 0),))
    found = compiled(excluding(interfaces=("eth1",)), wiring)
    assert verdict(found, PolicyKind.ROUTE, abi.address(POD6)) == 1
    assert verdict(found, PolicyKind.ROUTE, abi.address(POD4)) == 0


def test_no_routes_are_listed_where_no_interface_is_excluded() -> None:
    """They may be many."""
    for redirect in (Redirect(), excluding(interfaces=("eth9",))):
        assert PolicyKind.ROUTE not in {one.kind for one in compiled(redirect).prefixes}


def test_interfaces() -> None:
    redirect = Redirect(virtual_interfaces=("k6t0", "eth1", "gone"), exclude=Exclusions(interfaces=("eth1",)))
    found = compiled(redirect)
    roles = {index: verdict(found, PolicyKind.INTERFACE, number(index, 32)) for index in (2, 3, 4)}
    assert roles == {2: InterfaceRole.NONE, 3: InterfaceRole.EXCLUDED, 4: InterfaceRole.VIRTUAL}
    assert found.links == (2, 3, 4), "packets are watched on all"


def test_resolvers() -> None:
    found = compiled(Redirect(dns_to=("10.0.0.53", "fd00::53")))
    assert verdict(found, PolicyKind.RESOLVER, abi.address(ip_address("10.0.0.53"))) == 1
    assert verdict(found, PolicyKind.RESOLVER, abi.address(ip_address("10.0.0.54"))) == 0


# --- the entry


def test_addresses() -> None:
    """The first that it can speak with stand in the entry, the others in the policy, loopback nowhere."""
    found = compiled()
    assert (found.pod.own4, found.pod.own6, found.pod.link6) == (POD4, POD6, LINK6)
    assert [one for one in found.prefixes if one.kind == PolicyKind.OWN] == [
        Prefix(PolicyKind.OWN, abi.address(IPv4Address("10.1.0.5")), 128)
    ]
    assert (str(found.pod.probe4), str(found.pod.probe6)) == (Redirect().probe_ipv4, Redirect().probe_ipv6)


def test_a_pod_without_addresses_has_none() -> None:
    found = compiled(wiring=PodTopology()).pod
    assert (found.own4, found.own6, found.link6) == (None, None, None)


@given(
    st.fixed_dictionaries({n: st.booleans() for n in ("ipv4", "ipv6", "dns", "ingress_only", "refuse_non_tcp")}),
    st.fixed_dictionaries({n: st.booleans() for n in ("forwards", "loopback4")}),
)
def test_flags(wants: dict[str, bool], has: dict[str, bool]) -> None:
    flags = compiled(Redirect(**wants), replace(WIRING, **has)).pod.flags
    said = {
        PodFlag.IPV4: wants["ipv4"], PodFlag.IPV6: wants["ipv6"], PodFlag.DNS: wants["dns"],
        PodFlag.INGRESS_ONLY: wants["ingress_only"], PodFlag.REFUSE: wants["refuse_non_tcp"],
        PodFlag.FORWARDS: has["forwards"], PodFlag.LOOPBACK4: has["loopback4"],
    }  # fmt: skip
    assert {flag: flag in flags for flag in said} == said


@given(st.sets(st.sampled_from(["outbound_ports", "inbound_ports", "users", "outbound_networks", "inbound_networks"])))
def test_has_names_the_kinds_that_are_listed(given_: set[str]) -> None:
    values: dict[str, Any] = {name: (("10.0.0.0/8",) if "networks" in name else ((1, 2),)) for name in given_}
    found = compiled(excluding(**values), replace(WIRING, addresses=(POD4,)))
    assert found.pod.has == sum(1 << kind for kind in {one.kind for one in found.prefixes})
    assert len({one.kind for one in found.prefixes}) == len(given_)
    assert bool(found.pod.policy) == bool(given_)


# --- ids

_prefixes = st.lists(
    st.builds(Prefix, st.sampled_from(PolicyKind), st.binary(min_size=16, max_size=16), st.integers(0, 128),
              st.integers(0, 3)),
    max_size=5, unique=True,
)  # fmt: skip


@given(_prefixes, _prefixes, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_equal_wants_have_equal_ids_and_others_others(
    one: list[Prefix], two: list[Prefix], cookie: int, other: int
) -> None:
    assert policy(cookie, one) == policy(cookie, list(one))
    assert (policy(cookie, one) == 0) == (not one)
    if one != two:
        assert policy(cookie, one) != policy(cookie, two)
    if one and cookie != other:
        assert policy(cookie, one) != policy(other, one), "two pods share no prefixes"


def test_the_order_of_what_is_wanted_is_no_matter() -> None:
    backwards = replace(WIRING, links=WIRING.links[::-1], routes=WIRING.routes[::-1])
    redirect = Redirect(
        virtual_interfaces=("k6t0", "eth1"), dns_to=("10.0.0.53", "fd00::53"), exclude=Exclusions(interfaces=("eth0",))
    )
    assert compiled(redirect) == compiled(replace(redirect, dns_to=redirect.dns_to[::-1]), backwards)


def test_a_pod_that_drains_takes_nothing_new_and_still_speaks_for_clients() -> None:
    takes = PodFlag.IPV4 | PodFlag.IPV6 | PodFlag.DNS | PodFlag.REFUSE
    found, whole = compiled(Redirect(draining=True, refuse_non_tcp=True)), compiled(Redirect(refuse_non_tcp=True))
    assert whole.pod.flags & takes == takes and not found.pod.flags & takes
    assert replace(found.pod, flags=whole.pod.flags) == whole.pod and found.links == whole.links


# --- where there is a way


def reach(wiring: PodTopology, address: str, redirect: Redirect = Redirect()) -> int:  # noqa: B008
    return verdict(compiled(redirect, wiring), PolicyKind.REACH, abi.address(ip_address(address)), none=1)


def test_without_a_default_route_only_the_listed_networks_are_reached() -> None:
    routes = (*WIRING.routes[:3], Route(ip_network("fe80::/64"), 2, 256), Route(ip_network("fd00:9::/64"), 0, 1))
    wiring = replace(WIRING, routes=routes)
    found = {one: reach(wiring, one) for one in ("2001:db8::1", "fe80::9", "fd00:9::1", "192.0.2.1", "10.1.0.9")}
    assert found == {"2001:db8::1": 0, "fe80::9": 1, "fd00:9::1": 0, "192.0.2.1": 1, "10.1.0.9": 1}


def test_two_halves_are_a_default_route() -> None:
    wiring = replace(WIRING, routes=(Route(ip_network("::/1"), 2, 1), Route(ip_network("8000::/1"), 2, 1)))
    assert reach(wiring, "2001:db8::1") == reach(wiring, "fd00::1") == 1 and reach(wiring, "192.0.2.1") == 0


def test_nothing_is_said_where_the_main_table_does_not_tell() -> None:
    kind = 1 << PolicyKind.REACH
    assert not compiled().pod.has & kind, "both families have a default route"
    assert not compiled(wiring=replace(WIRING, routes=(), elsewhere=True)).pod.has & kind
    assert not compiled(Redirect(ipv6=False), replace(WIRING, routes=WIRING.routes[:1])).pod.has & kind


def test_a_link_local_address_of_ipv4_is_the_pods_where_there_is_no_other() -> None:
    local = IPv4Address("169.254.172.2")
    assert compiled(wiring=PodTopology(addresses=(local, LINK6, POD6))).pod.own4 == local
    assert compiled(wiring=PodTopology(addresses=(local, LINK6, POD4))).pod.own4 == POD4
