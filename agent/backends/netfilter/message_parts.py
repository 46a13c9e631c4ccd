# SPDX-License-Identifier: Apache-2.0
"""Parts of nf_tables messages that both netfilter backends use: iptables-nft writes nf_tables too. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.backends.netfilter import rules
from agent.backends.netfilter.rules import Hook, Table
from agent.core.text import printable
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attribute, attributes, nested, unpack_be

HOOK_NUMBER = {Hook.PREROUTING: 0, Hook.OUTPUT: 3}


def base_chain(table: Table, hook: Hook) -> bytes:
    """Returns the attributes that make a chain a base chain with policy accept."""
    kind, priority = rules.BASE[table, hook]
    place = nested(
        wire.Chain.HOOK,
        attribute(wire.Hook.HOOKNUM, HOOK_NUMBER[hook]),
        attribute(wire.Hook.PRIORITY, priority & 0xFFFFFFFF),
    )
    return place + attribute(wire.Chain.TYPE, kind) + attribute(wire.Chain.POLICY, wire.VerdictCode.ACCEPT)


def hook_and_priority(place: bytes) -> tuple[int, int]:
    """Returns (hook number, priority) of a base chain, from NFTA_CHAIN_HOOK."""
    parts = dict(attributes(place))
    priority = int.from_bytes(parts.get(wire.Hook.PRIORITY, b""), signed=True)
    return unpack_be(parts.get(wire.Hook.HOOKNUM)), priority


def expressions(rule: Mapping[int, bytes]) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Yields (name, attributes) of each expression of a rule, from the rule's attributes."""
    for _, element in attributes(rule.get(wire.Rule.EXPRESSIONS, b"")):
        parts = dict(attributes(element))
        yield text(parts.get(wire.Expr.NAME)), dict(attributes(parts.get(wire.Expr.DATA, b"")))


def rule_comment(rule: Mapping[int, bytes]) -> str:
    """Returns iptables' comment: 1.8.9 keeps it as a match with 256 bytes of text, others as the rule's user data."""
    found = comment(rule.get(wire.Rule.USERDATA, b""))
    for name, data in expressions(rule):
        if name == "match" and text(data.get(wire.XtMatch.NAME)) == "comment":
            found = data.get(wire.XtMatch.INFO, b"").split(b"\0")[0].decode(errors="replace")
    return found


def comment_data(words: str) -> bytes:
    """Encodes a comment as user data, which the kernel only keeps: type 0, length, text with its zero byte."""
    return bytes([0, len(words) + 1]) + words.encode() + b"\0"


def text(payload: bytes | None) -> str:
    """Decodes a name or comment, to compare and to print: the kernel lets a pod use any bytes in its own."""
    return printable((payload or b"").rstrip(b"\0").decode(errors="replace"))


def comment(userdata: bytes) -> str:
    """Returns the comment in a rule's or table's user data, "" without one; types and lengths are single bytes."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        if kind == 0:
            return text(userdata[offset + 2 : offset + 2 + length])
        offset += 2 + length
    return ""
