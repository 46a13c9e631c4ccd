# SPDX-License-Identifier: Apache-2.0
"""Dumps that differ in nothing of substance are one; others are not; and no bytes break the readers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.backends.netfilter import dumps as nfdumps
from agent.backends.netfilter import foreign_rules
from agent.backends.netfilter.dumps import Ruleset
from agent.backends.netfilter.foreign_rule import effect
from agent.backends.nftables import expressions, reading
from agent.backends.nftables.rendering import TABLES, render
from agent.core.model.redirect import Redirect
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import HEADER, attribute
from agent.core.wire.nftables import NEWCHAIN, NEWRULE, NEWTABLE, NFPROTO_INET, NFPROTO_IPV4

PORT, GENERATION = 1000, 7


def dump(kind: int, bodies: list[bytes], *, port: int = PORT, sequence: int = 5, generation: int = GENERATION) -> bytes:
    """Messages as the kernel puts them into a dump: with port, sequence and the low half of the generation."""
    parts = []
    for body in bodies:
        whole = body[:2] + generation.to_bytes(4)[2:] + body[4:]
        parts.append(HEADER.pack(HEADER.size + len(whole), kind, 2, sequence, port) + whole)
    return b"".join(parts)


def dumps(want: Redirect, more: list[bytes] | None = None, *, count: int = 0, **differences: int) -> Ruleset:
    """What a kernel that holds our rules would dump; `more` are rules of others."""
    rendering = render(want, False)
    of = {kind: [c.body for c in rendering.commands if c.kind == kind] for kind in (NEWTABLE, NEWCHAIN, NEWRULE)}
    head = bytes([NFPROTO_INET, 0, 0, 0])
    counted = expressions.COUNTER.replace(bytes(8), count.to_bytes(8))
    rules = [head + body.replace(expressions.COUNTER, counted) for body in of[NEWRULE]] + (more or [])
    tables, chains = ([head + body for body in of[kind]] for kind in (NEWTABLE, NEWCHAIN))
    parts = ((NEWTABLE, tables), (NEWCHAIN, chains), (NEWRULE, rules))
    return nfdumps.ruleset(*(dump(kind, bodies, **differences) for kind, bodies in parts))


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    nfdumps._known.clear()
    yield
    nfdumps._known.clear()


def test_equal_rules_are_one_whatever_sequence_port_generation_and_counters() -> None:
    first = dumps(Redirect())
    for differences in ({"port": 77}, {"sequence": 9}, {"generation": 0x1FFFF}, {"count": 0xFFFFFFFFFFFF}):
        assert dumps(Redirect(), **differences).content is first.content
    assert reading.table_states(first) == render(Redirect(), False).tables
    assert reading.table_states(dumps(Redirect(), count=3)) == render(Redirect(), False).tables


@given(st.data())
def test_any_other_byte_makes_another_rule_set(data: st.DataObject) -> None:
    body = bytes([NFPROTO_IPV4, 0, 0, 0]) + attribute(1, "t") + attribute(2, "c") + attribute(7, b"0123456789")
    place = data.draw(st.integers(4, len(body) - 1))
    altered = body[:place] + bytes([body[place] ^ data.draw(st.integers(1, 255))]) + body[place + 1 :]
    one, other = dumps(Redirect(), [body]), dumps(Redirect(), [altered])
    assert one.content is not other.content
    assert dumps(Redirect(), [body], count=5).content is one.content


def test_what_a_comment_says_is_no_counter() -> None:
    def commented(number: int) -> bytes:
        words = b"counter\0\x1c\0\2\0\x0c\0\1\0" + number.to_bytes(8) + b"\x0c\0\2\0" + bytes(8)
        return bytes([NFPROTO_INET, 0, 0, 0]) + attribute(1, TABLES[0]) + attribute(2, "output") + attribute(7, words)

    assert reading.table_states(dumps(Redirect(), [commented(1)])) != render(Redirect(), False).tables


def test_few_are_kept() -> None:
    for number in range(300):
        dumps(Redirect(dns=False), [bytes([NFPROTO_INET, 0, 0, 0]) + attribute(1, "x" * number)])
    assert len(nfdumps._known) <= 64


def test_what_another_owns_may_go_by_itself() -> None:
    ruleset = dumps(Redirect())
    assert ruleset.lasts(PORT)
    for owner, lasts in ((PORT, True), (PORT + 1, False)):
        assert Ruleset((replace(ruleset.tables[0], owner=owner),), ruleset.content).lasts(PORT) is lasts


def test_our_own_rules_cast_no_shadow() -> None:
    for want in (Redirect(), Redirect(refuse_non_tcp=True, virtual_interfaces=("eth1",))):
        assert foreign_rules.chains(dumps(want), NFPROTO_INET, TABLES[0], ipv6=True) == ()
        assert foreign_rules.chains(dumps(want), 0, "nat", ipv6=True) == ()


@given(st.binary(max_size=200))
def test_any_expressions(data: bytes) -> None:
    assert isinstance(str(effect({wire.Rule.EXPRESSIONS: data})), str)


_names = st.sampled_from(["meta", "ct", "payload", "bitwise", "cmp", "immediate", "nat", "match", "target", "x"])


@given(st.lists(st.tuples(_names, st.lists(st.tuples(st.integers(1, 8), st.binary(max_size=24))))))
def test_any_attributes_of_known_expressions(parts: list[tuple[str, list[tuple[int, bytes]]]]) -> None:
    data = b"".join(expressions.expression(name, *(attribute(*one) for one in inner)) for name, inner in parts)
    assert isinstance(effect({wire.Rule.EXPRESSIONS: data}).elsewhere, bool)


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_any_dumps(tables: bytes, chains: bytes, rules: bytes) -> None:
    ruleset = nfdumps.ruleset(tables, chains, rules)
    assert isinstance(foreign_rules.chains(ruleset, NFPROTO_INET, TABLES[0], ipv6=True), tuple)
    assert isinstance(reading.table_states(ruleset), tuple)
