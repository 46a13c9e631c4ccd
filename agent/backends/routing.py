# SPDX-License-Identifier: Apache-2.0
"""The policy rules and local routes of a pod.

With packet marks (Redirect.marks) they deliver replies to those of ztunnel's sockets that use a client's address. With
every mechanism they deliver packets to ztunnel from a socket that is bound to an interface.

A layer of its own, with the same four verbs: a switch between mechanisms leaves it alone, or removes only the part for
marks. `route_places` chooses tables and preferences and recognises Sluice's rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn
from weakref import WeakKeyDictionary

from agent.backends import route_places
from agent.backends.base import Support
from agent.backends.netfilter import foreign_rules
from agent.backends.route_places import TABLES, RoutePlace
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.wire.rtnetlink import Item, command, difference
from agent.kernel import scratch
from agent.kernel.netlink.notifications import NotificationMark
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.pod_netns import PodNetns

_MOST_INTERFACES = 32  # of a pod that get a route: it may have any number


@dataclass(frozen=True, slots=True)
class RouteChange:
    item: Item
    add: bool


def _empty() -> Mapping[int, RoutePlace]:
    return {family: RoutePlace((), route_places.usual(family)) for family in (4, 6)}


@dataclass(frozen=True, slots=True)
class RoutingState:
    """Actual and desired items by family, for the families that the namespace has."""

    places: Mapping[int, RoutePlace] = field(default_factory=_empty)

    @property
    def remarks(self) -> tuple[str, ...]:
        return tuple(foreign_rules.describe(rule) for place in self.places.values() for rule in place.before)


class RoutingBackend:
    """Four verbs over rtnetlink. While a namespace has no IPv6, nothing of IPv6 is read or changed."""

    name = "routing"
    outlives = False

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[PodNetns, tuple[NotificationMark, bool, RoutingState]] = WeakKeyDictionary()

    def probe(self) -> Support:
        try:
            scratch.call(_try)
        except KernelError as error:
            return Support(False, f"policy routing is refused ({error}); it needs CONFIG_IP_MULTIPLE_TABLES")
        return Support(True)

    def read(self, target: PodNetns) -> RoutingState:
        """Returns the last read while no notification says otherwise."""
        last = self._last.get(target)
        ipv6 = target.has_ipv6()
        if last is not None and last[1] == ipv6 and target.route_events.unchanged_since(last[0]):
            return last[2]
        mark = target.route_events.mark()
        have = _read(target.route, (4, 6) if ipv6 else (4,))
        self._last[target] = (mark, ipv6, have)
        return have

    def plan(self, want: Redirect | None, have: RoutingState) -> Plan[RouteChange]:
        """Raises KernelError when every table that we may take is in foreign use."""
        wanted: list[Item] = []
        for family, place in have.places.items():
            if want is None or not (want.ipv4 if family == 4 else want.ipv6):
                continue
            if want.marks and not place.wanted:
                _refuse(family)
            wanted += [item for item in place.wanted if want.marks or route_places.is_for_bound(item)]
        held = [item for place in have.places.values() for item in place.held]
        # Deletions in the other order: no rule may point at a table that is empty already.
        changes = [RouteChange(item, True) for item in wanted if item not in held]
        changes += [RouteChange(item, False) for item in reversed(held) if item not in wanted]
        # Interfaces come and go, and the kernel removes their routes: that is not reported.
        due = [c for c in changes if want is None or not route_places.is_for_bound(c.item)]
        differences = tuple(difference(c.item, add=c.add) for c in due)
        # Nothing comes before rules that are not wanted; None asks what would come before them.
        return Plan(steps(changes), differences, remarks=have.remarks if want is None or want.marks else ())

    def apply(self, target: PodNetns, plan: Plan[RouteChange]) -> None:
        self._last.pop(target, None)
        for step in plan.steps:
            target.route.change(step.payload.item, add=step.payload.add)


def plain(have: RoutingState) -> Plan[RouteChange]:
    """Removes what the existing ambient agents do not have."""
    held = [item for place in have.places.values() for item in place.held if route_places.is_for_bound(item)]
    return Plan(steps([RouteChange(item, False) for item in reversed(held)]))


def steps(changes: Sequence[RouteChange]) -> tuple[Step[RouteChange], ...]:
    return tuple(Step(f"ip {command(c.item, add=c.add)}", c) for c in changes)


def _read(route: RouteSocket, families: tuple[int, ...]) -> RoutingState:
    route.lo_is_up()  # for its order alone: what was notified before is done now, and is seen below
    rules = route.rules(ipv6=6 in families)
    places = {}
    up = {link.index for link in route.links() if link.up}
    held = route.held_addresses()
    for family in families:
        routes = {table: route.table_routes(family, table) for table in TABLES}
        interfaces = {one.index for one in held if one.address.version == family} & up
        places[family] = route_places.place(family, rules, routes, sorted(interfaces)[:_MOST_INTERFACES])
    return RoutingState(places)


def _refuse(family: int) -> NoReturn:
    *first, last = map(str, TABLES)
    cause = f"the pod uses routing tables {', '.join(first)} and {last} of IPv{family} itself; free one of them"
    raise KernelError("ip rule add", 0, cause)


def _try() -> None:
    with contextlib.closing(RouteSocket()) as route:
        route.change(route_places.usual(4)[1], add=True)
