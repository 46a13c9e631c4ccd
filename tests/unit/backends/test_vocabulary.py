# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the backends: what every rule must have, tags, digests, scripts, the choice."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from agent.backends.iptables.rendering import XtTable, render, script
from agent.backends.netfilter import rules as netfilter
from agent.backends.netfilter.rules import Field, RuleAction, Table
from agent.backends.nftables import expressions
from agent.backends.nftables.ruleset import Chain, TableState, differences, digest
from agent.backends.route_places import RoutePlace, usual
from agent.backends.routing import RoutingBackend, RoutingState
from agent.core.model.exclusions import Exclusions
from agent.core.model.ownership import tag_chain
from agent.core.model.redirect import Redirect
from agent.core.wire.netlink import attribute, nested

_ranges = st.sampled_from([(), ((80, 80),), ((53, 53), (8000, 9000))])
_networks = st.sampled_from([(), ("10.0.0.0/8",), ("fd00::/8",), ("10.0.0.0/8", "192.0.2.1/32", "fd00::/8")])
redirects = st.builds(
    Redirect,
    ipv4=st.booleans(),
    ipv6=st.booleans(),
    dns=st.booleans(),
    ingress_only=st.booleans(),
    virtual_interfaces=st.lists(st.sampled_from(["eth1", "net1", "k6t-eth0"]), unique=True).map(tuple),
    dns_to=st.lists(st.sampled_from(["1.1.1.1", "8.8.8.8", "2001:db8::53"]), unique=True).map(tuple),
    exclude=st.builds(
        Exclusions,
        outbound_ports=_ranges,
        inbound_ports=_ranges,
        outbound_networks=_networks,
        inbound_networks=_networks,
        users=_ranges,
        interfaces=st.sampled_from([(), ("net1",)]),
    ),
    refuse_non_tcp=st.booleans(),
    preserve=st.booleans(),
)


@given(redirects)
def test_p52_no_rule_lacks_its_qualifier_and_addresses_are_of_the_rules_family(redirect: Redirect) -> None:
    families = {4: redirect.ipv4, 6: redirect.ipv6}
    for rule in netfilter.rules(redirect):
        fields = {match.field for match in rule.matches}
        assert rule.matches, "a rule without a match would take everything"
        if rule.verb in (RuleAction.REDIRECT, RuleAction.ZONE):
            assert Field.PROTOCOL in fields
        if {Field.SOURCE_PORT, Field.DESTINATION_PORT} & fields:
            assert Field.PROTOCOL in fields
        if rule.verb is RuleAction.REDIRECT and Field.IN_INTERFACE not in fields:
            assert Field.MARK in fields, "ztunnel's own traffic would come back to it"
        for match in rule.matches:
            assert match.value not in ("", ())
            if match.field in (Field.SOURCE, Field.DESTINATION):
                for one in match.value if isinstance(match.value, tuple) else (match.value,):
                    assert ipaddress.ip_network(one).version == rule.family
        assert rule.family is None or families[rule.family]
        if rule.table is Table.RAW:
            assert redirect.dns


def test_a_tag_names_its_rule_and_everything_before_it() -> None:
    three = tag_chain(["a", "b", "c"], "nat OUTPUT")
    assert len(set(three)) == 3 and tag_chain(["a", "b"], "nat OUTPUT") == three[:2]
    assert tag_chain(["a", "x", "c"], "nat OUTPUT")[2] != three[2]
    assert tag_chain(["b", "a", "c"], "nat OUTPUT")[2] != three[2]
    assert tag_chain(["a"], "nat PREROUTING")[0] != three[0]


def counter(packets: int) -> bytes:
    numbers = packets.to_bytes(8), (packets * 60).to_bytes(8)
    return expressions.expression("counter", attribute(1, numbers[1]), attribute(2, numbers[0]))


def test_a_digest_ignores_counters_and_what_newer_kernels_add() -> None:
    rule = netfilter.rules(Redirect())[-1]
    _, ours, _ = expressions.rule(rule)
    counted = ours.replace(expressions.COUNTER, counter(12345))
    assert counted != ours and digest(counted) == digest(ours)
    load = expressions.expression("meta", attribute(2, 3), attribute(1, 1))
    newer = nested(1, attribute(1, "meta"), nested(2, attribute(2, 3), attribute(1, 1), attribute(99, 7)))
    assert digest(load) == digest(newer)


def test_a_digest_tells_any_two_rules_apart() -> None:
    rules = netfilter.rules(Redirect(virtual_interfaces=("eth1", "eth2")))
    found = {digest(expressions.rule(rule)[1]): rule for rule in rules}
    assert len(found) == len({(r.matches, r.verb, r.value) for r in rules})


def test_differences_in_words() -> None:
    def table(*rules: tuple[str, str], name: str = "t") -> TableState:
        return TableState(name, (Chain("c", rules),))

    want = (table(("one", "x"), ("two", "y")),)
    assert list(differences(want, want)) == []
    assert list(differences(want, ())) == ["table inet t is missing"]
    assert list(differences((), want)) == ["table inet t is not wanted"]
    assert list(differences(want, (table(("two", "y")),))) == ["chain t c: 1 of 2 rules missing"]
    assert "not wanted" in next(differences(want, (table(("one", "x"), ("", "z"), ("two", "y")),)))
    for altered in (table(("two", "y"), ("one", "x")), table(("one", "x"), ("two", "other"))):
        assert list(differences(want, (altered,))) == ["chain t c: rules altered or in another order"]


def test_an_iptables_script_touches_what_differs_and_nothing_else() -> None:
    want = render(Redirect(), 4)
    assert script(want, dict(want.tables)) == ""
    nat = want.tables["nat"]
    broken = {**want.tables, "nat": XtTable(nat.chains, nat.jumps[1:])}
    text = script(want, broken)
    assert "*nat" in text and "*mangle" not in text and "*raw" not in text
    assert text.count("-A OUTPUT") == 1 and "-A PREROUTING" not in text
    doubled = {**want.tables, "nat": XtTable(nat.chains, (*nat.jumps, nat.jumps[0]))}
    assert script(want, doubled).count("-D OUTPUT") == 1
    removal = script(render(Redirect(ipv4=False), 4), dict(want.tables))
    assert ":ISTIO" not in removal and removal.count("-X ISTIO_OUTPUT") == 3


def test_routing_adds_the_route_first_and_removes_it_last() -> None:
    backend = RoutingBackend()
    want, (route, rule) = Redirect(ipv6=False), usual(4)
    assert [step.payload.item for step in backend.plan(want, RoutingState()).steps] == [route, rule]
    held = {size: RoutingState({4: RoutePlace((route, *[rule] * size), (route, rule))}) for size in (1, 2)}
    assert [step.payload.item for step in backend.plan(None, held[1]).steps] == [rule, route]
    assert not backend.plan(want, held[1])
    assert len(backend.plan(want, held[2]).steps) == 0, "a second one adds nothing"
