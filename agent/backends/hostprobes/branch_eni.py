# SPDX-License-Identifier: Apache-2.0
"""Pods on a branch interface of AWS (security groups for pods): the way of probes and of their replies.

Such a pod's packets are routed by rules of their own, "iif DEVICE lookup T", where T leads to the virtual network
alone and knows the pod by one host route. A probe then needs "to POD lookup T", or it leaves by the node's own
interface; and its reply, once translated back, needs "iif DEVICE lookup local" before the rule that was found, or
it leaves by the branch interface (istio 59778, aws/amazon-vpc-cni-k8s 3557). Where no such rules are there is nothing
to do, so the mechanism is always on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from agent.backends.base import Support
from agent.backends.hostprobes.want import HostProbes
from agent.backends.routing import RouteChange, steps
from agent.core import names
from agent.core.model.plan import Plan
from agent.core.wire.policy_rules import by_interface_or_destination
from agent.core.wire.rtnetlink import LookupRule, Table, difference
from agent.kernel.host_netns import HostNetns

TO_POD_PRIORITY: Final = 512
_SHARED = frozenset({Table.UNSPEC, Table.MAIN, Table.LOCAL})  # no pod's own table


@dataclass(frozen=True, slots=True)
class BranchState:
    """`rules` of both families; `routes`: (family, table) -> address -> device, host routes of tables named by them."""

    rules: tuple[LookupRule, ...]
    routes: Mapping[tuple[int, int], Mapping[str, str]]


def wanted(want: HostProbes, have: BranchState) -> tuple[LookupRule, ...]:
    """Returns the rules that the pods need, those of one device once. The way back comes first."""
    rules = dict[LookupRule, None]()
    for rule in have.rules:
        for address, device in have.routes.get((rule.family, rule.table), {}).items():
            if _of_pod(rule) and device == rule.iif and address in want.of(rule.family):
                rules[_own_rule(rule.family, rule.preference - 1, Table.LOCAL, iif=rule.iif)] = None
                rules[_own_rule(rule.family, TO_POD_PRIORITY, rule.table, to=address)] = None
    return tuple(rules)


def _own_rule(family: int, preference: int, table: int, *, iif: str = "", to: str = "") -> LookupRule:
    return LookupRule(family, preference, table=table, protocol=names.ROUTING_PROTOCOL, to=to, iif=iif)


def _of_pod(rule: LookupRule) -> bool:
    return bool(rule.iif) and rule.table not in _SHARED and rule.preference > 0 and not rule.ours


class BranchEni:
    """Four verbs over policy rules. Sluice's carry a protocol number; an equal foreign rule serves as well."""

    name = "branch-eni"

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: HostNetns) -> BranchState:
        parsed = map(by_interface_or_destination, target.route.rules(ipv6=True))
        rules = tuple(rule for rule in parsed if rule is not None)
        tables = {(rule.family, rule.table): rule.iif for rule in rules if _of_pod(rule)}
        devices = {rule.iif for rule in rules if _of_pod(rule)}
        numbers = target.call(lambda: {_index(name): name for name in devices})
        return BranchState(rules, {table: dict(_routes(target, *table, numbers)) for table in tables})

    def plan(self, want: HostProbes | None, have: BranchState) -> Plan[RouteChange]:
        due = wanted(want, have) if want else ()
        there = {replace(rule, protocol=names.ROUTING_PROTOCOL) for rule in have.rules}
        changes = [RouteChange(rule, True) for rule in due if rule not in there]
        mine = [rule for rule in have.rules if rule.ours]
        if want is None or want.complete:
            # The way to the pod goes before the way back; a pod with unknown addresses keeps both.
            gone = [rule for rule in mine if rule not in due and not (want and want.unknown)]
            changes += [RouteChange(rule, False) for rule in sorted(gone, key=lambda rule: bool(rule.iif))]
        return Plan(steps(changes), tuple(difference(c.item, add=c.add) for c in changes))

    def apply(self, target: HostNetns, plan: Plan[RouteChange]) -> None:
        for step in plan.steps:
            target.route.change(step.payload.item, add=step.payload.add)


def _routes(target: HostNetns, family: int, table: int, devices: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for address, number in target.route.host_routes(family, table):
        if number in devices:
            yield address, devices[number]


def _index(name: str) -> int:
    """Returns the index of an interface of the calling thread's namespace, 0 when it does not exist."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
