"""Which table and which preference a pod's policy rule takes, and which rules and routes there are ours. Pure.

The existing ambient agents take table 100 and preference 32764 without looking. So do we where both are free. A table
is taken when it has a route of somebody else, or when a policy rule of theirs leads there. A preference is only good
below that of every rule that would take our marked packets first.

Ours is what carries our protocol number. A rule that is exactly the usual one is ours without it (the existing agents
write none), and so is the usual route, unless somebody else's rule leads to its table.
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
    """In one family: `held` are our items with repeats, `wanted` what capture needs, which is () without a free table.

    `before`: rules of others that our rule cannot come before.
    """

    held: tuple[Item, ...]
    wanted: tuple[Item, ...]
    before: tuple[FibRule, ...] = ()


def place(family: int, rules: Sequence[FibRule], routes: Routes) -> Place:
    """From all policy rules, and what TABLES hold of this family."""
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
    """What a namespace without anything of others gets. The route goes first: a rule without it leads nowhere."""
    return LocalRoute(family, names.ROUTE_TABLE), _rule(family, names.RULE_PREFERENCE, names.ROUTE_TABLE)


def _rule(family: int, preference: int, table: int) -> MarkRule:
    # The usual one as the existing agents write it: the kernel takes one of another protocol for another rule.
    known = (preference, table) == (names.RULE_PREFERENCE, names.ROUTE_TABLE)
    protocol = 0 if known else names.ROUTING_PROTOCOL
    return MarkRule(family, preference, names.CONNECTION_MARK, names.MARK_MASK, table, protocol)


def _ours(rule: FibRule) -> MarkRule | None:
    """A rule that selects by our mark and by nothing else, if it is ours."""
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
    """The tables in the order in which they are tried: one that is in use is kept."""
    return tuple(dict.fromkeys((*(rule.table for rule in ours), *TABLES)))


def _free(routes: Sequence[LocalRoute | None], is_ours: Callable[[LocalRoute | None], bool]) -> bool:
    return all(is_ours(route) for route in routes)


def _preference(ours: Sequence[MarkRule], others: Sequence[FibRule], first: int) -> int:
    """Below `first`: that of our rule if it has a good one, else the next that nobody uses, else the usual one."""
    for rule in ours:
        if rule.preference < first:
            return rule.preference
    taken = {rule.preference for rule in others}
    free = (one for one in range(min(names.RULE_PREFERENCE, first - 1), 0, -1) if one not in taken)
    return next(free, names.RULE_PREFERENCE)


def _kept(held: Sequence[Item], wanted: Item) -> Item:
    """The same as it is held, whoever is noted as its maker."""
    return next((item for item in held if _place(item) == _place(wanted)), wanted)


def _place(item: Item) -> tuple[int, ...]:
    return (item.family, item.table, item.preference if isinstance(item, MarkRule) else -1)
