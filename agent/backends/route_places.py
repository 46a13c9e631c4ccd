# SPDX-License-Identifier: Apache-2.0
"""Chooses the table and preference of a pod's policy rule, and separates our rules and routes from foreign ones. Pure.

The existing ambient agents use table 100 and preference 32764 without looking. So do we where both are free. A table is
taken if it holds a foreign route, or if a foreign policy rule leads to it. The preference has to be lower
than that of every rule that would match our marked packets first.

Rules and routes with our protocol number are ours. So is a rule that is exactly the usual one (the existing agents set
no number), and the usual route unless a foreign rule leads to its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from agent.backends.netfilter import foreign_rules
from agent.core import names
from agent.core.wire.policy_rules import FibRule
from agent.core.wire.rtnetlink import LOOPBACK_INDEX, Action, Item, LocalRoute, LookupRule

TABLES = (names.ROUTE_TABLE, *names.SPARE_TABLES)
Routes = Mapping[int, Sequence[LocalRoute | None]]  # of each of TABLES, None for a route of another form


@dataclass(frozen=True, slots=True)
class RoutePlace:
    """Items of one family: `held` are ours, duplicates included; `wanted` what capture needs, () if no table is free.

    `before`: rules of others that come before ours all the same.
    """

    held: tuple[Item, ...]
    wanted: tuple[Item, ...]
    before: tuple[FibRule, ...] = ()


def place(family: int, rules: Sequence[FibRule], routes: Routes, interfaces: Sequence[int] = ()) -> RoutePlace:
    """Places the items, by all policy rules and this family's routes in TABLES.

    `interfaces`: indices of those that sockets may be bound to (SO_BINDTODEVICE, link-local peers).
    """
    mine = [rule for rule in rules if rule.family == family]
    known = [(rule, _own_rule(rule)) for rule in mine]
    own = [one for _, one in known if one]
    others = [rule for rule, one in known if not one]
    led = {rule.table for rule in others if rule.action == Action.TO_TBL}
    is_ours = partial(_our_route, led=led)
    held: tuple[Item, ...] = (*(route for t in TABLES for route in routes[t] if route and is_ours(route)), *own)
    table = next((t for t in _by_use(own) if _free(routes[t], is_ours) and t not in led), None)
    if table is None:
        return RoutePlace(held, ())
    suspects = foreign_rules.rules(others)
    preference = _preference(own, others, min((rule.preference for rule in suspects), default=1 << 32))
    items = LocalRoute(family, table), _rule(family, preference, table)
    wanted = (*items, *_for_bound(family, preference, table, interfaces))
    before = tuple(rule for rule in suspects if rule.preference <= preference)
    return RoutePlace(held, tuple(_kept(held, item) for item in wanted), before)


def usual(family: int) -> tuple[Item, ...]:
    """Returns the items for a namespace without foreign rules. The route first: without it the rule leads nowhere."""
    return LocalRoute(family, names.ROUTE_TABLE), _rule(family, names.RULE_PREFERENCE, names.ROUTE_TABLE)


def is_for_bound(item: Item) -> bool:
    """True if only sockets that are bound to an interface need it. Such items come and go with the interfaces."""
    return bool(item.to) if isinstance(item, LookupRule) else item.interface != LOOPBACK_INDEX


def _for_bound(family: int, preference: int, table: int, interfaces: Sequence[int]) -> Iterator[Item]:
    """Adds per interface: the kernel looks for its routes alone, and the table `local` has loopback addresses on lo."""
    for interface in interfaces:
        yield LocalRoute(family, table, interface=interface)
    if interfaces:
        yield LookupRule(family, preference, table=table, protocol=names.ROUTING_PROTOCOL, to=names.LOOPBACK[family])


def _rule(family: int, preference: int, table: int) -> LookupRule:
    # The usual one as the existing agents write it: the kernel takes one of another protocol for another rule.
    known = (preference, table) == (names.RULE_PREFERENCE, names.ROUTE_TABLE)
    protocol = 0 if known else names.ROUTING_PROTOCOL
    return LookupRule(
        family, preference, mark=names.CONNECTION_MARK, mask=names.MARK_MASK, table=table, protocol=protocol
    )


def _own_rule(rule: FibRule) -> LookupRule | None:
    """Returns the rule as a LookupRule if it is ours: it selects by our mark, or by loopback addresses, only."""
    if rule.action != Action.TO_TBL or rule.table not in TABLES:
        return None
    is_own = rule.protocol == names.ROUTING_PROTOCOL
    usual = (rule.preference, rule.table) == (names.RULE_PREFERENCE, names.ROUTE_TABLE)
    one = LookupRule(
        rule.family, rule.preference, mark=rule.mark, mask=rule.mask, table=rule.table, protocol=rule.protocol
    )
    marked = (rule.mark, rule.mask) == (names.CONNECTION_MARK, names.MARK_MASK)
    to = names.LOOPBACK[rule.family]
    if rule.plain and marked and (is_own or usual):
        return one
    if replace(rule, others=()).plain and rule.others == (f"to {to}",) and not rule.mask and is_own:
        return replace(one, to=to)
    return None


def _our_route(route: LocalRoute | None, led: set[int]) -> bool:
    if route is None:
        return False
    adopted = route.table == names.ROUTE_TABLE and route.table not in led
    return route.protocol == names.ROUTING_PROTOCOL or adopted


def _by_use(own: Sequence[LookupRule]) -> Sequence[int]:
    """Returns the tables in the order in which they are tried: those in use first."""
    return tuple(dict.fromkeys((*(rule.table for rule in own), *TABLES)))


def _free(routes: Sequence[LocalRoute | None], is_ours: Callable[[LocalRoute | None], bool]) -> bool:
    return all(is_ours(route) for route in routes)


def _preference(own: Sequence[LookupRule], others: Sequence[FibRule], first: int) -> int:
    """Picks one below `first`: that of Sluice's rule if low enough, else the next unused one, else the usual one."""
    for rule in own:
        if rule.mask and rule.preference < first:
            return rule.preference
    taken = {rule.preference for rule in others}
    free = (one for one in range(min(names.RULE_PREFERENCE, first - 1), 0, -1) if one not in taken)
    return next(free, names.RULE_PREFERENCE)


def _kept(held: Sequence[Item], wanted: Item) -> Item:
    """Returns the item that is held in the same place, with any protocol number, else `wanted`."""
    return next((item for item in held if _key(item) == _key(wanted)), wanted)


def _key(item: Item) -> tuple[int, ...]:
    if isinstance(item, LookupRule):
        return item.family, item.table, item.preference, bool(item.to)
    return item.family, item.table, -1, item.interface
