# SPDX-License-Identifier: Apache-2.0
"""What goes into the maps comes out of them the same."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import ExitCause, PodFlag, PodValue, PolicyKind, Prefix

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
_addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda one: not one.ipv4_mapped))  # type: ignore[union-attr]
_maybe = st.none() | _addresses.filter(lambda one: not (one.version == 6 and int(one) == 0))
_flags = st.sets(st.sampled_from(PodFlag)).map(lambda found: PodFlag(sum(found)))
_bytes = st.binary(min_size=16, max_size=16)


@given(
    st.builds(
        PodValue,
        flags=_flags,
        has=U32,
        policy=U64,
        own4=_maybe,
        own6=_maybe,
        link6=_maybe,
        probe4=_maybe,
        probe6=_maybe,
    )
)
def test_pods(pod: PodValue) -> None:
    assert PodValue.decode(pod.encode()) == pod
    assert len(pod.encode()) == 96


@given(st.binary().filter(lambda data: len(data) != 96))
def test_a_pod_of_another_version_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes are no pod"):
        PodValue.decode(data)


@given(st.builds(Prefix, st.sampled_from(PolicyKind), _bytes, st.integers(0, 128), U32), U64)
def test_prefixes(one: Prefix, policy: int) -> None:
    assert abi.prefix(one.key(policy), one.encode()) == (policy, one)


@given(_addresses)
def test_addresses(one: Any) -> None:
    assert len(abi.address(one)) == 16
    assert abi.parse(abi.address(one)) == (one if int(one) or one.version == 4 else None)


@given(_addresses, _addresses)
def test_addresses_are_told_apart(one: Any, two: Any) -> None:
    assume(one != two)
    assert abi.address(one) != abi.address(two)


def test_no_address() -> None:
    assert abi.address(None) == bytes(16) and abi.parse(bytes(16)) is None
    assert abi.parse(abi.address(ip_address("0.0.0.0"))) == ip_address("0.0.0.0")
    assert abi.parse(IPv6Address("::ffff:10.0.0.1").packed) == ip_address("10.0.0.1"), "as sockets of IPv6 have it"


@given(U64, U32)
def test_ztunnels(cgroup: int, tgid: int) -> None:
    assert abi.unztunnel(abi.ztunnel(cgroup, tgid)) == (cgroup, tgid)


@given(U64)
def test_cookies(number: int) -> None:
    assert abi.uncookie(abi.cookie(number)) == number


_keys = st.tuples(U64, st.integers(0, 1), st.integers(0, 1))


@given(_keys, _keys)
def test_listeners_and_counters_are_told_apart(one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
    assert (abi.listener(*one) == abi.listener(*two)) == (one == two)
    assert (abi.non_tcp_key(*one[:2]) == abi.non_tcp_key(*two[:2])) == (one[:2] == two[:2])


def test_exits_are_numbered_without_gaps() -> None:
    assert [*map(int, ExitCause)] == list(range(len(ExitCause)))
