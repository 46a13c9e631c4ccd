# SPDX-License-Identifier: Apache-2.0
"""Where capture puts its policy rule and route, and what of a namespace it takes for its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.backends.route_places import TABLES, place, usual
from agent.backends.routing import RoutingBackend, RoutingState
from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.redirect import Redirect
from agent.core.wire.policy_rules import FibRule
from agent.core.wire.rtnetlink import Action, LocalRoute, LookupRule

MARKED = {"mark": names.CONNECTION_MARK, "mask": names.MARK_MASK}
OURS, SPARE = names.ROUTING_PROTOCOL, names.SPARE_TABLES[0]
KERNEL = (
    FibRule(4, 0, action=Action.TO_TBL, table=255),
    FibRule(4, 32766, action=Action.TO_TBL, table=254),
    FibRule(4, 32767, action=Action.TO_TBL, table=253),
)
ROUTE, RULE = usual(4)
USUAL = FibRule(4, 32764, action=Action.TO_TBL, table=100, **MARKED)


def theirs(preference: int, table: int, **more: object) -> FibRule:
    return replace(FibRule(4, preference, action=Action.TO_TBL, table=table), **more)  # type: ignore[arg-type]


def routes(**held: LocalRoute | None) -> dict[int, list[LocalRoute | None]]:
    """By table, as t100=route; None is a route of somebody else."""
    return {table: [held[f"t{table}"]] if f"t{table}" in held else [] for table in TABLES}


def moved(preference: int, table: int) -> tuple[LocalRoute, LookupRule]:
    return LocalRoute(4, table), LookupRule(4, preference, **MARKED, table=table, protocol=OURS)


def test_an_empty_namespace_gets_the_usual_form() -> None:
    found = place(4, KERNEL, routes())
    assert (found.held, found.wanted, found.before) == ((), (ROUTE, RULE), ())


@pytest.mark.parametrize("protocol", [0, 3, OURS])
def test_the_usual_form_is_kept_whoever_made_it(protocol: int) -> None:
    route, rule = LocalRoute(4, 100, protocol), replace(USUAL, protocol=protocol)
    found = place(4, (rule, *KERNEL), routes(t100=route))
    assert found.wanted == found.held == (route, LookupRule(4, 32764, **MARKED, table=100, protocol=protocol))


@pytest.mark.parametrize(
    ("rules", "held"),
    [
        ((), {"t100": None}),  # a route of theirs
        ((theirs(30000, 100, others=("from 10.0.0.1",)),), {}),  # a rule of theirs leads there, still to be filled
        ((theirs(30000, 100, mark=1, mask=0xFF),), {"t100": LocalRoute(4, 100, 3)}),  # TPROXY: exactly our route
    ],
    ids=["route", "rule", "tproxy"],
)
def test_a_table_of_somebody_else_is_neither_taken_nor_emptied(
    rules: tuple[FibRule, ...], held: dict[str, LocalRoute | None]
) -> None:
    found = place(4, (*rules, *KERNEL), routes(**held))
    below = 29999 if rules and not rules[0].mask else 32764
    assert found.held == () and found.wanted == moved(below, SPARE)
    made = (*rules, FibRule(4, below, action=Action.TO_TBL, table=SPARE, **MARKED, protocol=OURS), *KERNEL)
    again = place(4, made, routes(**held, **{f"t{SPARE}": LocalRoute(4, SPARE)}))
    assert again.held == again.wanted == found.wanted, "a fresh process finds it again"
    gone = place(4, made, routes(**{f"t{SPARE}": LocalRoute(4, SPARE)}))
    assert gone.wanted == found.wanted, "and leaves it there when the other table is free again"


def test_a_route_of_ours_without_its_rule_is_still_ours() -> None:
    left = LocalRoute(4, SPARE)
    assert place(4, KERNEL, routes(**{f"t{SPARE}": left})).held == (left,)
    assert place(4, KERNEL, routes(**{f"t{SPARE}": replace(left, protocol=3)})).held == ()


def test_who_comes_into_our_table_later_makes_us_move_without_touching_theirs() -> None:
    rules = (theirs(200, 100, others=("from 10.0.0.1",)), USUAL, *KERNEL)
    found = place(4, rules, {**routes(), 100: [ROUTE, None]})
    assert found.wanted == moved(199, SPARE) and found.held == (ROUTE, RULE)


@pytest.mark.parametrize(
    ("before", "preference"),
    [
        (theirs(100, 200, others=("from 10.0.0.1",)), 99),
        (theirs(32763, 51820, mark=0xCA6C, mask=0xFFFFFFFF, inverted=True), 32762),
        (FibRule(4, 100, action=2, table=0), 99),  # goto
        (theirs(32764, 200), 32763),
        (theirs(32764, 200, iif="eth0"), 32763),  # takes nothing of ours, but the number
        (theirs(100, 200, mark=5, mask=0xFFF), 32764),
        (theirs(100, 200, iif="eth0"), 32764),
    ],
)
def test_our_rule_comes_before_all_that_would_take_its_packets(before: FibRule, preference: int) -> None:
    found = place(4, (before, *KERNEL), routes())
    assert [item.preference for item in found.wanted if isinstance(item, LookupRule)] == [preference]
    assert found.before == ()


def test_what_nobody_can_come_before_is_remarked_on() -> None:
    first = theirs(0, 200)
    assert place(4, (first, *KERNEL), routes()).before == (first,)


def test_without_a_free_table_the_pod_is_refused_and_what_is_ours_can_go() -> None:
    full = place(4, (USUAL, *KERNEL), {table: [None] for table in TABLES})
    assert full.held == (RULE,) and full.wanted == ()
    with pytest.raises(KernelError, match=r"the pod uses routing tables 100, 13370, .* and 13373 of IPv4 itself"):
        RoutingBackend().plan(Redirect(), RoutingState({4: full}))
    assert [step.payload.item for step in RoutingBackend().plan(None, RoutingState({4: full})).steps] == [RULE]


FOR_BOUND = tuple(LocalRoute(4, 100, interface=index) for index in (2, 5))
TO_LOOPBACK = LookupRule(4, 32764, table=100, protocol=OURS, to="127.0.0.0/8")
LED = FibRule(4, 32764, action=Action.TO_TBL, table=100, others=("to 127.0.0.0/8",), protocol=OURS)


def test_interfaces_that_sockets_may_be_bound_to_have_a_route_each() -> None:
    found = place(4, KERNEL, routes(), (2, 5))
    assert found.wanted == (ROUTE, RULE, *FOR_BOUND, TO_LOOPBACK)
    again = place(4, (USUAL, LED, *KERNEL), {**routes(), 100: [ROUTE, *FOR_BOUND]}, (2, 5))
    assert sorted(map(str, again.held)) == sorted(map(str, again.wanted)) == sorted(map(str, found.wanted))
    assert RoutingBackend().plan(Redirect(ipv6=False), RoutingState({4: again})).steps == ()


def test_what_follows_the_interfaces_is_no_drift_and_goes_with_the_rest() -> None:
    gone = place(4, (USUAL, LED, *KERNEL), {**routes(), 100: [ROUTE, *FOR_BOUND]}, (2,))
    plan = RoutingBackend().plan(Redirect(ipv6=False), RoutingState({4: gone}))
    assert [step.payload.item for step in plan.steps] == [FOR_BOUND[1]] and plan.differences == ()
    plan = RoutingBackend().plan(None, RoutingState({4: gone}))
    assert len(plan.steps) == len(plan.differences) == 5


def test_a_rule_to_loopback_is_ours_only_by_its_number() -> None:
    theirs_to = replace(LED, protocol=3)
    found = place(4, (theirs_to, *KERNEL), routes(), (2,))
    assert found.held == () and found.wanted[0] == LocalRoute(4, SPARE), "their rule leads to table 100"
    assert not LED.elsewhere and theirs_to.elsewhere
