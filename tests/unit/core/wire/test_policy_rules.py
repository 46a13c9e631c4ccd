# SPDX-License-Identifier: Apache-2.0
"""Policy rules of every form from the bytes that the kernel dumps."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.wire.netlink import attribute
from agent.core.wire.policy_rules import FibRule, by_interface_or_destination, parse
from agent.core.wire.rtnetlink import FIB_RULE_HDR, Action, LocalRoute, LookupRule, command, difference

MARKED = {6: 32764, 10: 0x111, 16: 0xFFF, 15: 100}


def body(
    parts: dict[int, int | bytes],
    *,
    family: int = socket.AF_INET,
    dst: int = 0,
    src: int = 0,
    flags: int = 0,
    action: int = 1,
) -> bytes:
    packed = (attribute(k, struct.pack("=I", v) if isinstance(v, int) else v) for k, v in parts.items())
    return FIB_RULE_HDR.pack(family, dst, src, 0, 0, 0, 0, action, flags) + b"".join(packed)


def test_ours_selects_by_its_mark_alone() -> None:
    rule = parse(body({**MARKED, 14: b"\xff\xff\xff\xff", 21: b"\3"}))
    assert rule == FibRule(4, 32764, action=1, table=100, mark=0x111, mask=0xFFF, protocol=3) and rule.plain


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (body({**MARKED, 3: b"eth0\0"}), "fwmark 0x111/0xfff iif eth0 lookup 100"),
        (body({**MARKED, 17: b"eth0\0"}), "fwmark 0x111/0xfff oif eth0 lookup 100"),
        (body(MARKED, flags=2), "not fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 2: bytes([10, 0, 0, 0])}, src=8), "from 10.0.0.0/8 fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 1: bytes([10, 0, 0, 7])}, dst=32), "to 10.0.0.7 fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 20: struct.pack("=II", 0, 9)}), "uidrange 0-9 fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 24: struct.pack("=HH", 53, 53)}), "dport 53 fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 22: b"\6"}), "ipproto tcp fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 19: b"\1"}), "l3mdev fwmark 0x111/0xfff lookup 100"),
        (body({**MARKED, 14: 0}), "suppress_prefixlength 0 fwmark 0x111/0xfff lookup 100"),
        (body({6: 5}, action=7, family=socket.AF_INET6), "unreachable"),
        (body({15: 254}), "lookup main"),
    ],
)
def test_every_other_selector_is_seen(found: bytes, words: str) -> None:
    rule = parse(found)
    assert rule is not None and str(rule) == words
    assert rule.plain == (words in ("unreachable", "lookup main"))


def test_rules_of_multicast_routing_are_none() -> None:
    assert parse(body(MARKED, family=128)) is None and parse(b"") is None


@given(st.sampled_from([2, 10]), st.binary(max_size=120))
def test_any_bytes(family: int, rest: bytes) -> None:
    rule = parse(bytes([family]) + rest)
    assert rule is None or str(rule)


def test_a_jump_is_printed_with_its_target() -> None:
    assert str(FibRule(4, 700, action=Action.GOTO, table=0, goto=32764)) == "goto 32764"


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (FibRule(4, 10, action=1, table=101, iif="vlan1"), LookupRule(4, 10, table=101, iif="vlan1")),
        (
            FibRule(6, 9, action=1, table=101, others=("to fd00::1",)),
            LookupRule(6, 9, table=101, to="fd00::1"),
        ),
        (FibRule(4, 9, action=1, table=101, others=("to 10.0.0.0/8",)), None),
        (FibRule(4, 9, action=1, table=101, others=("from 10.0.0.1",)), None),
        (FibRule(4, 9, action=1, table=101, iif="vlan1", others=("to 10.0.0.1",)), None),
        (FibRule(4, 9, action=1, table=101, iif="vlan1", others=("ipproto tcp",)), None),
        (FibRule(4, 9, action=1, table=101, iif="vlan1", mark=1, mask=1), None),
        (FibRule(4, 9, action=1, table=101, iif="vlan1", oif="eth0"), None),
        (FibRule(4, 9, action=1, table=101, iif="vlan1", inverted=True), None),
        (FibRule(4, 9, action=6, table=0, iif="vlan1"), None),
        (FibRule(4, 9, action=1, table=101), None),
    ],
)
def test_rules_by_interface_or_destination_alone(rule: FibRule, found: LookupRule | None) -> None:
    assert by_interface_or_destination(rule) == found


def test_an_item_as_a_command_and_as_a_difference() -> None:
    rule = LookupRule(6, 32764, mark=0x111, mask=0xFFF, table=100)
    assert command(rule, add=True) == "-6 rule add fwmark 0x111/0xfff lookup 100 pref 32764"
    assert difference(rule, add=True) == "ip -6 rule fwmark 0x111/0xfff lookup 100 pref 32764 is missing"
    wrong = difference(LocalRoute(4, 100), add=False)
    assert wrong.startswith("ip route local 0.0.0.0/0 dev lo table 100") and wrong.endswith(" is not wanted")
