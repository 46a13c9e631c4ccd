# SPDX-License-Identifier: Apache-2.0
"""The legacy tables as python-iptables reads them: the wanted rules, in order, and the tags that we read."""

from __future__ import annotations

from typing import Any

import pytest
from support import legacyreader
from support.rules import pod

from agent.backends.iptables.legacy import IptablesLegacyBackend
from agent.backends.iptables.rendering import CHAINS
from agent.backends.netfilter import rules as netfilter
from agent.backends.netfilter.rules import Field, Rule, RuleAction, Table
from agent.core.model.redirect import Redirect
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
ANY = {4: "0.0.0.0/0.0.0.0", 6: "::/0"}
NAMES = {"ipv6-icmp": "icmpv6"}
TARGETS = {
    RuleAction.ACCEPT: "ACCEPT",
    RuleAction.RETURN: "RETURN",
    RuleAction.DROP: "DROP",
    RuleAction.COUNT: "",
    RuleAction.REDIRECT: "REDIRECT",
    RuleAction.SET_CONNECTION_MARK: "CONNMARK",
    RuleAction.RESTORE_MARK: "CONNMARK",
    RuleAction.ZONE: "CT",
    RuleAction.ORIGINAL_ZONE: "CT",
}


def wanted(rule: Rule, family: int) -> dict[str, Any]:
    """A rule in python-iptables' words, made from our values and not from our text."""
    found: dict[str, Any] = {
        "protocol": "ip", "source": ANY[family], "destination": ANY[family], "in": None, "out": None, "matches": {},
        "target": TARGETS[rule.verb],
    }  # fmt: skip
    protocol = next((str(m.value) for m in rule.matches if m.field is Field.PROTOCOL), "")
    for match in rule.matches:
        sign = "!" if match.negated else ""
        parts = [sign] if sign else []
        match match.field:
            case Field.PROTOCOL:
                found["protocol"] = NAMES.get(protocol, protocol)
            case Field.SOURCE | Field.DESTINATION:
                key = "source" if match.field is Field.SOURCE else "destination"
                host = f"{match.value}/{'255.255.255.255' if family == 4 else '128'}"
                found[key] = sign + (str(match.value) if "/" in str(match.value) else host)
            case Field.IN_INTERFACE | Field.OUT_INTERFACE:
                found["in" if match.field is Field.IN_INTERFACE else "out"] = f"{sign}{match.value}"
            case Field.SOURCE_PORT | Field.DESTINATION_PORT:
                key = "sport" if match.field is Field.SOURCE_PORT else "dport"
                found["matches"].setdefault(protocol, {})[key] = [*parts, str(match.value)]
            case Field.MARK | Field.CONNECTION_MARK:
                name = "mark" if match.field is Field.MARK else "connmark"
                found["matches"][name] = {"mark": [*parts, f"{match.value:#x}/0xfff"]}
            case Field.ESTABLISHED:
                found["matches"]["conntrack"] = {"ctstate": ["ESTABLISHED"]}
            case Field.DNAT:
                found["matches"]["conntrack"] = {"ctstate": [*parts, "DNAT"]}
            case Field.CONFIRMED:
                found["matches"]["conntrack"] = {"ctstatus": [*parts, "CONFIRMED"]}
            case Field.OPENING:
                flags = [*parts, "FIN,SYN,RST,ACK", "SYN"]
                found["matches"].setdefault(protocol, {})["tcp-flags"] = flags
    return found


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "want",
    [
        Redirect(), Redirect(dns=False), Redirect(ingress_only=True), Redirect(virtual_interfaces=("eth1",)),
        Redirect(refuse_non_tcp=True), Redirect(preserve=True),
    ],
)  # fmt: skip
def test_an_independent_reader_finds_the_wanted_rules(want: Redirect, family: int) -> None:
    backend = IptablesLegacyBackend()
    with pod() as one:
        settle(one.target, want, [backend])
        ours = backend.read(one.target).families[family]  # first: the other reader makes what it looks for
        found = legacyreader.read(one.path, family)
    for table in Table:
        for hook, chain in CHAINS.items():
            mine = [rule for rule in netfilter.rules(want) if (rule.table, rule.hook) == (table, hook)]
            rules = [rule for rule in mine if rule.family in (None, family)]
            held = found.get(f"{table.value} {chain}", [])
            shown = [{k: v for k, v in rule.items() if k not in ("comment", "parameters")} for rule in held]
            assert shown == [wanted(rule, family) for rule in rules], (table, chain)
            to = [rule["parameters"].get("to-ports", []) for rule in held if rule["target"] == "REDIRECT"]
            assert to == [[str(rule.value)] for rule in rules if rule.verb is RuleAction.REDIRECT]
            tags = dict(ours[table.value].chains)[chain] if table.value in ours else ()
            assert tuple(rule["comment"] for rule in held) == tags
            if rules:
                (jump,) = found[f"{table.value} {hook.name}"]
                assert (jump["target"], jump["matches"], jump["protocol"]) == (chain, {}, "ip")
