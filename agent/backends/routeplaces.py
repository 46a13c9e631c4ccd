"""Chooses the table and preference of a pod's policy rule, and tells our rules and routes from others. Pure.

The existing ambient agents use table 100 and preference 32764 without looking. So do we where both are free. A table is
taken if it holds somebody else's route, or if somebody else's policy rule leads to it. The preference has to be lower
than that of every rule that would match our marked packets first.

Rules and routes with our protocol number are ours. So is a rule that is exactly the usual one (the existing agents set
no number), and the usual route unless somebody else's rule leads to its table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from agent.backends import shadows
from agent.core import names
from agent.core.fibrules import TO_TABLE, FibRule
from agent.kernel.rtnetlink import LocalRoute, MarkRule

TABLES = (names.ROUTE_TABLE, *names.SPARE_TABLES)
Item = MarkRule | LocalRoute
Routes = Mapping[int, Sequence[LocalRoute | None]]  # of each of TABLES, None for a route of another form


@dataclass(frozen=True, slots=True)
class Place:
    """In one family: `held` are our items, duplicates included; `wanted` what capture needs, () if no table is free.

    `before`: rules of others that come before ours all the same.
    """

    held: tuple[Item, ...]
    wanted: tuple[Item, ...]
    before: tuple[FibRule, ...] = ()


def place(family: int, rules: Sequence[FibRule], routes: Routes) -> Place:
    """From all policy rules and this family's routes in TABLES."""
    mine = [rule for rule in rules if rule.family == family]
    ours = [known for rule in mine if (known := _ours(rule))]
    others = [rule for rule in mine if not _ours(rule)]
    led = {rule.table for rule in others if rule.action == TO_TABLE}
    is_ours = partial(_our_route, led=led)
    held: tuple[Item, ...] = (*(route for t in TABLES for route in routes[t] if route and is_ours(route)), *ours)
    table = next((t for t in _by_use(ours) if _free(routes[t], is_ours) and t not in led), None)
    if table is None:
        return Place(held, ())
    suspects = shadows.rules(others)
    preference = _preference(ours, others, min((rule.preference for rule in suspects), default=1 << 32))
    wanted = _kept(held, LocalRoute(family, table)), _kept(held, _rule(family, preference, table))
    return Place(held, wanted, tuple(rule for rule in suspects if rule.preference <= preference))


def usual(family: int) -> tuple[Item, ...]:
    """For a namespace without rules of others. The route comes first: without it the rule leads nowhere."""
    return LocalRoute(family, names.ROUTE_TABLE), _rule(family, names.RULE_PREFERENCE, names.ROUTE_TABLE)


def _rule(family: int, preference: int, table: int) -> MarkRule:
    # The usual one as the existing agents write it: the kernel takes one of another protocol for another rule.
    known = (preference, table) == (names.RULE_PREFERENCE, names.ROUTE_TABLE)
    protocol = 0 if known else names.ROUTING_PROTOCOL
    return MarkRule(family, preference, names.CONNECTION_MARK, names.MARK_MASK, table, protocol)


def _ours(rule: FibRule) -> MarkRule | None:
    """The rule as a MarkRule if it is ours: it selects by our mark and nothing else."""
    if not rule.plain or rule.action != TO_TABLE or rule.table not in TABLES:
        return None
    if (rule.mark, rule.mask) != (names.CONNECTION_MARK, names.MARK_MASK):
        return None
    made = rule.protocol == names.ROUTING_PROTOCOL
    usual = (rule.preference, rule.table) == (names.RULE_PREFERENCE, names.ROUTE_TABLE)
    one = MarkRule(rule.family, rule.preference, rule.mark, rule.mask, rule.table, rule.protocol)
    return one if made or usual else None


def _our_route(route: LocalRoute | None, led: set[int]) -> bool:
    if route is None:
        return False
    adopted = route.table == names.ROUTE_TABLE and route.table not in led
    return route.protocol == names.ROUTING_PROTOCOL or adopted


def _by_use(ours: Sequence[MarkRule]) -> Sequence[int]:
    """The tables in the order in which they are tried: those in use first."""
    return tuple(dict.fromkeys((*(rule.table for rule in ours), *TABLES)))


def _free(routes: Sequence[LocalRoute | None], is_ours: Callable[[LocalRoute | None], bool]) -> bool:
    return all(is_ours(route) for route in routes)


def _preference(ours: Sequence[MarkRule], others: Sequence[FibRule], first: int) -> int:
    """Below `first`: our rule's own if it is low enough, else the next unused one, else the usual one."""
    for rule in ours:
        if rule.preference < first:
            return rule.preference
    taken = {rule.preference for rule in others}
    free = (one for one in range(min(names.RULE_PREFERENCE, first - 1), 0, -1) if one not in taken)
    return next(free, names.RULE_PREFERENCE)


def _kept(held: Sequence[Item], wanted: Item) -> Item:
    """The item that is held in the same place, whatever its protocol number, else `wanted`."""
    return next((item for item in held if _place(item) == _place(wanted)), wanted)


def _place(item: Item) -> tuple[int, ...]:
    return (item.family, item.table, item.preference if isinstance(item, MarkRule) else -1)
