"""Which policy rules a branch interface needs: pure."""

from __future__ import annotations

from agent.backends.hostprobes.branch_eni import BranchEni, BranchState, wanted
from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.want import HostProbes
from agent.kernel.netlink.policy_rules import HeldRule, PolicyRule

IP, IP6 = "10.0.0.1", "fd00::1"
FOUND = HeldRule(PolicyRule(4, 10, 101, iif="vlan1"), False)
BACK, THERE = PolicyRule(4, 9, 255, iif="vlan1"), PolicyRule(4, 512, 101, to=IP)


def want(*addresses: str, complete: bool = True) -> HostProbes:
    claims = Claims()
    claims.claim("a", addresses)
    return claims.want("192.0.2.1", "2001:db8::1", ipv6=True, complete=complete)


def have(*rules: HeldRule, routes: dict[tuple[int, int], dict[str, str]] | None = None) -> BranchState:
    return BranchState(rules, {(4, 101): {IP: "vlan1"}} if routes is None else routes)


def test_a_rule_by_device_whose_table_knows_the_pod_on_that_device() -> None:
    assert wanted(want(IP), have(FOUND)) == (BACK, THERE)
    assert wanted(want("10.0.0.2"), have(FOUND)) == ()
    assert wanted(want(IP), have(FOUND, routes={(4, 101): {IP: "vlan2"}})) == ()
    assert wanted(want(IP), have(FOUND, routes={(6, 101): {IP: "vlan1"}})) == ()


def test_rules_of_everybody_and_our_own_are_nobodys_branch() -> None:
    for table in (0, 254, 255):
        rule = HeldRule(PolicyRule(4, 10, table, iif="vlan1"), False)
        assert wanted(want(IP), have(rule, routes={(4, table): {IP: "vlan1"}})) == ()
    assert wanted(want(IP), have(HeldRule(FOUND.rule, True))) == ()
    assert wanted(want(IP), have(HeldRule(PolicyRule(4, 0, 101, iif="vlan1"), False))) == (), "nothing comes before 0"


def test_ipv6_has_rules_of_its_own() -> None:
    rule = HeldRule(PolicyRule(6, 10, 101, iif="vlan1"), False)
    routes = {(6, 101): {IP6: "vlan1"}}
    assert wanted(want(IP6), have(rule, routes=routes)) == (
        PolicyRule(6, 9, 255, iif="vlan1"),
        PolicyRule(6, 512, 101, to=IP6),
    )
    assert "ip -6 rule add to fd00::1 lookup 101 pref 512" in str(
        BranchEni().plan(want(IP6), have(rule, routes=routes))
    )


def test_what_is_there_already_is_not_added_and_only_ours_is_removed() -> None:
    plan = BranchEni().plan
    theirs, ours = HeldRule(THERE, False), HeldRule(BACK, True)
    assert not plan(want(IP), have(FOUND, theirs, ours))
    gone = str(plan(want(), have(FOUND, theirs, ours, HeldRule(THERE, True))))
    assert gone == "", "a pod without addresses keeps what it has"
    released = HostProbes({}, "192.0.2.1", "2001:db8::1")
    lines = str(plan(released, have(FOUND, theirs, ours, HeldRule(THERE, True)))).splitlines()
    assert lines == [f"ip rule del {THERE}", f"ip rule del {BACK}"]
    assert str(plan(None, have(FOUND, theirs, ours))) == f"ip rule del {BACK}"
    assert not plan(HostProbes({}, "", "", complete=False), have(FOUND, ours)), "not all pods have been seen"
