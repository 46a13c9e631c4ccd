# SPDX-License-Identifier: Apache-2.0
"""Parts of nf_tables messages that both netfilter backends use: iptables-nft writes nf_tables too. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

from agent.backends.netfilter import rules
from agent.backends.netfilter.rules import Hook, Table
from agent.core.text import printable
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attribute, attributes, nested, unpack_be

HOOK_NUMBER = {Hook.PREROUTING: 0, Hook.OUTPUT: 3}


def base_chain(table: Table, hook: Hook) -> bytes:
    """Returns the attributes that make a chain a base chain with policy accept."""
    kind, priority = rules.BASE[table, hook]
    hook_attributes = nested(
        wire.Chain.HOOK,
        attribute(wire.Hook.HOOKNUM, HOOK_NUMBER[hook]),
        attribute(wire.Hook.PRIORITY, priority & 0xFFFFFFFF),
    )
    return hook_attributes + attribute(wire.Chain.TYPE, kind) + attribute(wire.Chain.POLICY, wire.VerdictCode.ACCEPT)


@dataclass(frozen=True, slots=True)
class ChainHead:
    """A chain without its rules. `kind`, `hook` and `priority` are empty for a regular chain, which has no policy."""

    family: int
    table: str
    name: str
    _: KW_ONLY
    kind: str = ""
    hook: int = -1
    priority: int = 0
    accepts: bool = True


@lru_cache(maxsize=1024)
def chain_head(body: bytes) -> ChainHead:
    """Parses a chain message."""
    parts = wire.fields(body)
    names = text(parts.get(wire.Chain.TABLE)), text(parts.get(wire.Chain.NAME))
    if wire.Chain.HOOK not in parts:
        return ChainHead(body[0], *names)
    hook = dict(attributes(parts[wire.Chain.HOOK]))
    return ChainHead(
        body[0],
        *names,
        kind=text(parts.get(wire.Chain.TYPE)),
        hook=unpack_be(hook.get(wire.Hook.HOOKNUM)),
        priority=int.from_bytes(hook.get(wire.Hook.PRIORITY, b""), signed=True),
        accepts=unpack_be(parts.get(wire.Chain.POLICY)) == wire.VerdictCode.ACCEPT,
    )


def expressions(rule: Mapping[int, bytes]) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Yields (name, attributes) of each expression of a rule, from the rule's attributes."""
    for _, element in attributes(rule.get(wire.Rule.EXPRESSIONS, b"")):
        parts = dict(attributes(element))
        yield text(parts.get(wire.Expr.NAME)), dict(attributes(parts.get(wire.Expr.DATA, b"")))


def rule_comment(rule: Mapping[int, bytes]) -> str:
    """Returns iptables' comment: 1.8.9 keeps it as a match with 256 bytes of text, others as the rule's user data."""
    content = comment(rule.get(wire.Rule.USERDATA, b""))
    if b"match\0" not in rule.get(wire.Rule.EXPRESSIONS, b""):
        return content  # most rules: to take their expressions apart costs ten times as much
    for name, data in expressions(rule):
        if name == "match" and text(data.get(wire.XtMatch.NAME)) == "comment":
            content = data.get(wire.XtMatch.INFO, b"").split(b"\0")[0].decode(errors="replace")
    return content


def comment_data(text: str) -> bytes:
    """Encodes a comment as user data, which the kernel only keeps: type 0, length, text with its zero byte."""
    return bytes([0, len(text) + 1]) + text.encode() + b"\0"


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
