# SPDX-License-Identifier: Apache-2.0
"""Writes rules in the exact form of istio-cni, which compares rule by rule and match by match. Pure.

The effect of a rule stays the same: only the order of matches changes, or a match occurs twice
(docs/design/istio-cni.md, 2.4 and 2.6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agent.backends.netfilter.rules import Field, Match, Rule, RuleAction

_INTERFACES = frozenset({Field.IN_INTERFACE, Field.OUT_INTERFACE})
_ADDRESSES = frozenset({Field.SOURCE, Field.DESTINATION})
_PORTS = frozenset({Field.SOURCE_PORT, Field.DESTINATION_PORT})


def nftables(rule: Rule) -> Rule:
    """Returns the rule with its matches in the order of istio-cni: interface, protocol, address, port, mark.

    A protocol that has a port stands before it, and with an interface the mark comes first.
    """
    fields = {match.field for match in rule.matches}
    has_port, mark_first = bool(fields & _PORTS), bool(fields & _INTERFACES and fields & _PORTS)

    def rank(match: Match) -> int:
        if match.field is Field.MARK:
            return 3 if mark_first else 6
        if match.field is Field.PROTOCOL:
            return 4 if has_port else 1
        return 0 if match.field in _INTERFACES else 2 if match.field in _ADDRESSES else 5

    return _sorted(rule, rank)


def iptables(rule: Rule) -> Rule:
    """Returns the rule as iptables -C compares it: extensions in order.

    With UDP the mark comes before the port; the accepted probe names its protocol as an extension too.
    """
    fields = {match.field for match in rule.matches}
    udp = any(match == Match(Field.PROTOCOL, "udp") for match in rule.matches)

    def rank(match: Match) -> int:
        return {Field.MARK: 1 if udp else 3}.get(match.field, 2 if match.field in _PORTS else 0)

    if rule.verb is RuleAction.ACCEPT and fields == {Field.PROTOCOL, *(fields & _ADDRESSES)}:
        twice = (replace(m, value=f"{m.value} -m {m.value}") if m.field is Field.PROTOCOL else m for m in rule.matches)
        rule = replace(rule, matches=tuple(twice))
    return _sorted(rule, rank)


def _sorted(rule: Rule, order: Callable[[Match], int]) -> Rule:
    return replace(rule, matches=tuple(sorted(rule.matches, key=order)))
