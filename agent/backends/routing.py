"""The policy rule and the local route that both netfilter backends rely on: replies to ztunnel's sockets
that speak with a client's address are delivered locally.

A layer of its own, with the same five verbs, so that switching between netfilter backends leaves it alone
and switching to a mechanism without packet marks (Redirect.marks) removes it. What is exactly equal to the wanted
rule or route is ours by definition: there is no room for a tag, and adding an equal one changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from agent.backends import shadows
from agent.backends.base import Support
from agent.core import names
from agent.core.errors import KernelError
from agent.core.fibrules import TO_TABLE, FibRule
from agent.core.plan import Plan, Step
from agent.core.redirect import Redirect
from agent.kernel import rtnetlink, scratch
from agent.kernel.notifications import Mark
from agent.kernel.podnetns import PodNetns
from agent.kernel.rtnetlink import LocalRoute, MarkRule, RouteSocket

Item = MarkRule | LocalRoute


@dataclass(frozen=True, slots=True)
class Change:
    item: Item
    add: bool


@dataclass(frozen=True, slots=True)
class Have:
    """Our items in the families that the namespace has, with repeats; and remarks on what comes before them."""

    items: tuple[Item, ...]
    families: tuple[int, ...] = (4, 6)
    remarks: tuple[str, ...] = ()


def items(family: int) -> tuple[Item, ...]:
    """The route goes first: a rule without its route would only fall through, but for nothing."""
    return (
        LocalRoute(family, names.ROUTE_TABLE),
        MarkRule(family, names.RULE_PREFERENCE, names.CONNECTION_MARK, names.MARK_MASK, names.ROUTE_TABLE),
    )


class RoutingBackend:
    """Five verbs over rtnetlink. While a namespace has no IPv6, nothing of IPv6 is read or changed."""

    name = "routing"
    outlives = False

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[PodNetns, tuple[Mark, bool, Have]] = WeakKeyDictionary()

    def probe(self) -> Support:
        try:
            scratch.call(_try)
        except KernelError as error:
            return Support(False, f"policy routing is refused ({error}); it needs CONFIG_IP_MULTIPLE_TABLES")
        return Support(True)

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[PodNetns, Redirect | None]:
        return desired

    def read(self, target: PodNetns) -> Have:
        """As last read, while no notification says otherwise."""
        last, ipv6 = self._last.get(target), target.has_ipv6()
        if last is not None and last[1] == ipv6 and target.route_events.unchanged_since(last[0]):
            return last[2]
        mark = target.route_events.mark()
        have = _read(target.route, (4, 6) if ipv6 else (4,))
        self._last[target] = (mark, ipv6, have)
        return have

    def plan(self, want: Redirect | None, have: Have | Sequence[Item]) -> Plan[Change]:
        """A bare sequence of items stands for a namespace with both families and nothing of others."""
        if not isinstance(have, Have):
            have = Have(tuple(have))
        wanted: list[Item] = []
        if want is not None and want.marks:
            for family, asked in ((4, want.ipv4), (6, want.ipv6)):
                wanted += items(family) if asked and family in have.families else ()
        # Deletions in the other order: no rule may point at a table that is empty already.
        changes = [Change(item, True) for item in wanted if item not in have.items]
        changes += [Change(item, False) for item in reversed(have.items) if item not in wanted]
        differences = tuple(f"ip {rtnetlink.text(c.item, add=c.add)} is due" for c in changes)
        steps = tuple(Step(f"ip {rtnetlink.text(c.item, add=c.add)}", c) for c in changes)
        return Plan(steps, differences, remarks=have.remarks)

    def apply(self, target: PodNetns, plan: Plan[Change]) -> None:
        self._last.pop(target, None)
        for step in plan.steps:
            target.route.change(step.payload.item, add=step.payload.add)


def _read(route: RouteSocket, families: tuple[int, ...]) -> Have:
    route.lo_is_up()  # for its order alone: what was notified before is done now, and is seen below
    known = {item for family in families for item in items(family)}
    found: list[Item] = []
    rules = route.rules(ipv6=6 in families)
    for family in families:
        found += [item for item in route.local_routes(family, names.ROUTE_TABLE) if item in known]
        marks = (_mark_rule(rule) for rule in rules if rule.family == family)
        found += [item for item in marks if item in known]
    suspects = shadows.rules(rules)
    remarks = tuple(
        shadows.words(rule) for rule in suspects if rule.action != TO_TABLE or route.has_routes(rule.family, rule.table)
    )
    return Have(tuple(found), families, remarks)


def _mark_rule(rule: FibRule) -> MarkRule | None:
    """A rule that selects by its mark and by nothing else."""
    if not rule.plain or rule.action != TO_TABLE:
        return None
    return MarkRule(rule.family, rule.preference, rule.mark, rule.mask, rule.table)


def _try() -> None:
    with contextlib.closing(RouteSocket()) as route:
        route.change(items(4)[1], add=True)
