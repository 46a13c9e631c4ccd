"""Pods on a branch interface of AWS (security groups for pods): the way of probes and of their replies.

Such a pod's packets are routed by rules of their own, "iif DEVICE lookup T", where T leads to the virtual network
alone and knows the pod by one host route. A probe then needs "to POD lookup T", or it leaves by the node's own
interface; and its reply, once translated back, needs "iif DEVICE lookup local" before the rule that was found, or
it leaves by the branch interface (istio 59778, aws/amazon-vpc-cni-k8s 3557). Where no such rules are there is nothing
to do, so the mechanism is always on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from agent.backends.base import Support
from agent.backends.hostprobes.want import HostProbes
from agent.core.model.plan import Plan, Step
from agent.kernel.host_netns import HostNetns
from agent.kernel.netlink import policy_rules
from agent.kernel.netlink.policy_rules import HeldRule, PolicyRule

TO_POD_PRIORITY: Final = 512
LOCAL: Final = 255
_EVERYBODYS = frozenset({0, 254, LOCAL})  # unspecified, main, local: no pod's own table
_FAMILIES = (4, 6)


@dataclass(frozen=True, slots=True)
class BranchState:
    """`rules` of both families; `routes`: (family, table) -> address -> device, host routes of tables named by them."""

    rules: tuple[HeldRule, ...]
    routes: Mapping[tuple[int, int], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class RuleChange:
    rule: PolicyRule
    add: bool

    def __str__(self) -> str:
        return f"ip {'-6 ' if self.rule.family == 6 else ''}rule {'add' if self.add else 'del'} {self.rule}"


def wanted(want: HostProbes, have: BranchState) -> tuple[PolicyRule, ...]:
    """The rules that the pods need, those of one device once. The way back comes first."""
    found = dict[PolicyRule, None]()
    for held in have.rules:
        rule = held.rule
        for address, device in have.routes.get((rule.family, rule.table), {}).items():
            if _of_pod(held) and device == rule.iif and address in want.of(rule.family):
                found[PolicyRule(rule.family, rule.priority - 1, LOCAL, iif=rule.iif)] = None
                found[PolicyRule(rule.family, TO_POD_PRIORITY, rule.table, to=address)] = None
    return tuple(found)


def _of_pod(held: HeldRule) -> bool:
    return bool(held.rule.iif) and held.rule.table not in _EVERYBODYS and held.rule.priority > 0 and not held.ours


class BranchEni:
    """Five verbs over policy rules. Ours carry a protocol number; an equal one of somebody else serves as well."""

    name = "branch-eni"

    def probe(self) -> Support:
        return Support(True)

    def targets(self, desired: Mapping[HostNetns, HostProbes | None]) -> Mapping[HostNetns, HostProbes | None]:
        return desired

    def read(self, target: HostNetns) -> BranchState:
        rules = tuple(rule for family in _FAMILIES for rule in policy_rules.rules(target.route, family))
        tables = {(held.rule.family, held.rule.table): held.rule.iif for held in rules if _of_pod(held)}
        devices = {held.rule.iif for held in rules if _of_pod(held)}
        numbers = target.call(lambda: {policy_rules.index(name): name for name in devices})
        return BranchState(rules, {place: dict(_routes(target, *place, numbers)) for place in tables})

    def plan(self, want: HostProbes | None, have: BranchState) -> Plan[RuleChange]:
        due = wanted(want, have) if want else ()
        there = {held.rule for held in have.rules}
        changes = [RuleChange(rule, True) for rule in due if rule not in there]
        ours = [held.rule for held in have.rules if held.ours]
        if want is None or want.complete:
            # The way to the pod goes before the way back; a pod whose addresses are not known keeps both.
            gone = [rule for rule in ours if rule not in due and not (want and want.unknown)]
            changes += [RuleChange(rule, False) for rule in sorted(gone, key=lambda rule: bool(rule.iif))]
        return Plan(tuple(Step(str(one), one) for one in changes), tuple(f"{one} is due" for one in changes))

    def apply(self, target: HostNetns, plan: Plan[RuleChange]) -> None:
        for step in plan.steps:
            policy_rules.change(target.route, step.payload.rule, add=step.payload.add)


def _routes(target: HostNetns, family: int, table: int, devices: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for address, number in policy_rules.host_routes(target.route, family, table):
        if number in devices:
            yield address, devices[number]
