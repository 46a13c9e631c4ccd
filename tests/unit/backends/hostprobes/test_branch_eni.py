# SPDX-License-Identifier: Apache-2.0
"""Which policy rules a branch interface needs: pure."""

from __future__ import annotations

from dataclasses import replace

from agent.backends.hostprobes.branch_eni import BranchEni, BranchState, wanted
from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.want import HostProbes
from agent.core import names
from agent.core.wire.rtnetlink import LookupRule

OURS = names.ROUTING_PROTOCOL
IP, IP6 = "10.0.0.1", "fd00::1"
FOUND = LookupRule(4, 10, table=101, iif="vlan1", protocol=0)
BACK, THERE = (
    LookupRule(4, 9, table=255, iif="vlan1", protocol=OURS),
    LookupRule(4, 512, table=101, to=IP, protocol=OURS),
)


def want(*addresses: str, complete: bool = True) -> HostProbes:
    claims = Claims()
    claims.claim("a", addresses)
    return claims.want("192.0.2.1", "2001:db8::1", ipv6=True, complete=complete)


def have(*rules: LookupRule, routes: dict[tuple[int, int], dict[str, str]] | None = None) -> BranchState:
    return BranchState(rules, {(4, 101): {IP: "vlan1"}} if routes is None else routes)


def test_a_rule_by_device_whose_table_knows_the_pod_on_that_device() -> None:
    assert wanted(want(IP), have(FOUND)) == (BACK, THERE)
    assert wanted(want("10.0.0.2"), have(FOUND)) == ()
    assert wanted(want(IP), have(FOUND, routes={(4, 101): {IP: "vlan2"}})) == ()
    assert wanted(want(IP), have(FOUND, routes={(6, 101): {IP: "vlan1"}})) == ()


def test_rules_of_everybody_and_our_own_are_nobodys_branch() -> None:
    for table in (0, 254, 255):
        rule = LookupRule(4, 10, table=table, iif="vlan1", protocol=0)
        assert wanted(want(IP), have(rule, routes={(4, table): {IP: "vlan1"}})) == ()
    assert wanted(want(IP), have(replace(FOUND, protocol=OURS))) == ()
    assert wanted(want(IP), have(LookupRule(4, 0, table=101, iif="vlan1", protocol=0))) == (), "nothing comes before 0"


def test_ipv6_has_rules_of_its_own() -> None:
    rule = LookupRule(6, 10, table=101, iif="vlan1", protocol=0)
    routes = {(6, 101): {IP6: "vlan1"}}
    assert wanted(want(IP6), have(rule, routes=routes)) == (
        LookupRule(6, 9, table=255, iif="vlan1", protocol=OURS),
        LookupRule(6, 512, table=101, to=IP6, protocol=OURS),
    )
    assert "ip -6 rule add to fd00::1 lookup 101 pref 512" in str(
        BranchEni().plan(want(IP6), have(rule, routes=routes))
    )


def test_what_is_there_already_is_not_added_and_only_ours_is_removed() -> None:
    plan = BranchEni().plan
    theirs, ours = replace(THERE, protocol=0), replace(BACK, protocol=OURS)
    assert not plan(want(IP), have(FOUND, theirs, ours))
    gone = str(plan(want(), have(FOUND, theirs, ours, replace(THERE, protocol=OURS))))
    assert gone == "", "a pod without addresses keeps what it has"
    released = HostProbes({}, probe_ipv4="192.0.2.1", probe_ipv6="2001:db8::1")
    lines = str(plan(released, have(FOUND, theirs, ours, replace(THERE, protocol=OURS)))).splitlines()
    assert lines == [f"ip rule del {THERE}", f"ip rule del {BACK}"]
    assert str(plan(None, have(FOUND, theirs, ours))) == f"ip rule del {BACK}"
    assert not plan(HostProbes({}, probe_ipv4="", probe_ipv6="", complete=False), have(FOUND, ours)), (
        "not all pods have been seen"
    )
