"""The policy rule and the local route that both netfilter backends rely on: replies to ztunnel's sockets
that speak with a client's address are delivered locally.

A layer of its own, with the same five verbs, so that switching between netfilter backends leaves it alone
and switching to a mechanism without packet marks removes it. What is exactly equal to the wanted rule or
route is ours by definition: there is no room for a tag, and adding an equal one changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from agent.backends.base import Support
from agent.core import names
from agent.core.errors import KernelError
from agent.core.plan import Plan, Step
from agent.core.redirect import Redirect
from agent.kernel import rtnetlink, scratch
from agent.kernel.podnetns import PodNetns
from agent.kernel.rtnetlink import LocalRoute, MarkRule, RouteSocket

Item = MarkRule | LocalRoute


@dataclass(frozen=True, slots=True)
class Change:
    item: Item
    add: bool


def items(family: int) -> tuple[Item, ...]:
    """The route goes first: a rule without its route would only fall through, but for nothing."""
    return (
        LocalRoute(family, names.ROUTE_TABLE),
        MarkRule(family, names.RULE_PREFERENCE, names.CONNECTION_MARK, names.MARK_MASK, names.ROUTE_TABLE),
    )


class RoutingBackend:
    """Five verbs over rtnetlink. `Have` is the list of our items, with repeats."""

    name = "routing"

    def probe(self) -> Support:
        try:
            scratch.call(_try)
        except KernelError as error:
            return Support(False, f"policy routing is refused ({error}); it needs CONFIG_IP_MULTIPLE_TABLES")
        return Support(True)

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[PodNetns, Redirect | None]:
        return desired

    def read(self, target: PodNetns) -> list[Item]:
        known = {item for family in (4, 6) for item in items(family)}
        found: list[Item] = []
        for family in (4, 6):
            found += [item for item in target.route.local_routes(family, names.ROUTE_TABLE) if item in known]
            found += [item for item in target.route.mark_rules(family) if item in known]
        return found

    def plan(self, want: Redirect | None, have: list[Item]) -> Plan[Change]:
        wanted: list[Item] = []
        if want is not None:
            wanted += items(4) if want.ipv4 else ()
            wanted += items(6) if want.ipv6 else ()
        # Deletions in the other order: no rule may point at a table that is empty already.
        changes = [Change(item, True) for item in wanted if item not in have]
        changes += [Change(item, False) for item in reversed(have) if item not in wanted]
        differences = tuple(f"ip {rtnetlink.text(c.item, add=c.add)} is due" for c in changes)
        return Plan(tuple(Step(f"ip {rtnetlink.text(c.item, add=c.add)}", c) for c in changes), differences)

    def apply(self, target: PodNetns, plan: Plan[Change]) -> None:
        for step in plan.steps:
            target.route.change(step.payload.item, add=step.payload.add)


def _try() -> None:
    with contextlib.closing(RouteSocket()) as route:
        route.change(items(4)[1], add=True)
