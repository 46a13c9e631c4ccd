# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product

import pytest

from agent.core.policy.phases import LIMITS, TRANSITIONS, CurrentPhase, Event, Phase

APPLIED = {Event.PRESERVED, Event.POSTPONED, Event.SWITCHED, Event.CAPTURED}
CAPTURING = {Phase.PRESERVING, Phase.POSTPONED, Phase.DRAINING, Phase.CAPTURED}
# What no pass can meet. A new phase or event is in TRANSITIONS or here, for each of the others.
IMPOSSIBLE = {
    # The capture of new connections stops where there is one; and there are no rules to remove.
    (Phase.UNCAPTURED, Event.STOPPED),
    (Phase.UNCAPTURED, Event.REMOVED),
    (Phase.WAITING, Event.STOPPED),
    # A captured pod is captured again in each pass, without waiting for ztunnel.
    *((phase, Event.AWAITED) for phase in CAPTURING),
    # Rules that capture are removed after they have drained.
    *((phase, Event.REMOVED) for phase in CAPTURING),
    (Phase.RETURNING, Event.REMOVED),
    # A pod that leaves runs: it returns before it is captured again.
    *((Phase.LEAVING, event) for event in APPLIED),
}
PAIRS = [(phase, event) for phase, event in product(Phase, Event) if (phase, event) not in IMPOSSIBLE]


def after(phase: Phase, event: Event) -> Phase:
    return CurrentPhase(phase).after(event, 0.0).phase


def reached(start: Phase) -> set[Phase]:
    found = {start}
    while more := {after(phase, event) for phase, event in PAIRS if phase in found} - found:
        found |= more
    return found


def test_every_phase_says_what_each_event_does_or_it_is_impossible() -> None:
    assert set(TRANSITIONS) == set(Phase)
    defined = {(phase, event) for phase, events in TRANSITIONS.items() for event in events}
    assert defined == set(PAIRS)
    for phase, event in IMPOSSIBLE:
        with pytest.raises(ValueError, match=f"{event.name} cannot happen .* {phase.name}"):
            after(phase, event)


def test_every_phase_is_reached_from_the_first_one_and_leads_to_capture_and_to_its_end() -> None:
    assert CurrentPhase().phase is Phase.UNCAPTURED
    assert reached(Phase.UNCAPTURED) == set(Phase)
    for phase in Phase:
        assert {Phase.UNCAPTURED, Phase.CAPTURED} <= reached(phase), phase


def test_rules_come_and_go_by_their_own_events_only() -> None:
    for phase, event in PAIRS:
        then = after(phase, event)
        if then.has_rules and not phase.has_rules:
            assert event in APPLIED | {Event.NOTED}, (phase, event)
        if phase.has_rules and not then.has_rules:
            assert event is Event.REMOVED and phase is Phase.LEAVING, (phase, event)
        if phase.captures and not then.captures:
            assert (event, then) == (Event.STOPPED, Phase.LEAVING), (phase, event)
        if event in APPLIED:
            assert then.captures and then is after(Phase.CAPTURED, event), (phase, event)
        if then.awaits_ztunnel and then is not phase:
            assert event is Event.AWAITED, (phase, event)


def test_a_phase_captures_or_drains_or_has_no_rules() -> None:
    for phase in Phase:
        assert phase.captures + phase.drains + (not phase.has_rules) == 1
        assert not (phase.awaits_ztunnel and phase.captures)
        assert not phase.ends_soon or phase.captures
    assert {phase for phase in Phase if phase.captures} == CAPTURING


def test_what_waits_has_a_deadline() -> None:
    assert set(LIMITS) == {phase for phase in Phase if phase.awaits_ztunnel or phase.drains}


def test_a_deadline_belongs_to_its_phase() -> None:
    """It runs on while the phase lasts, ends with it, and begins again with the next one."""
    for phase, event in PAIRS:
        current = CurrentPhase(phase, 40.0 if phase in LIMITS else None)
        then = current.after(event, 15.0)
        until = 15.0 + LIMITS[then.phase] if then.phase in LIMITS else None
        assert then == current if then.phase is phase else then.until == until, (phase, event)


def test_a_deadline_that_is_reached_has_passed() -> None:
    assert [CurrentPhase(Phase.WAITING, 40.0).expired(now) for now in (39.9, 40.0)] == [False, True]
    assert not CurrentPhase(Phase.CAPTURED).expired(1e9)


@pytest.mark.parametrize(
    ("events", "phases"),
    [
        ([Event.CAPTURED], [Phase.CAPTURED]),
        ([Event.AWAITED, Event.PRESERVED, Event.CAPTURED], [Phase.WAITING, Phase.PRESERVING, Phase.CAPTURED]),
        ([Event.AWAITED, Event.REMOVED], [Phase.WAITING, Phase.UNCAPTURED]),
        (
            [Event.NOTED, Event.POSTPONED, Event.SWITCHED, Event.CAPTURED],
            [Phase.CAPTURED, Phase.POSTPONED, Phase.DRAINING, Phase.CAPTURED],
        ),
        ([Event.CAPTURED, Event.STOPPED, Event.REMOVED], [Phase.CAPTURED, Phase.LEAVING, Phase.UNCAPTURED]),
        (
            [Event.CAPTURED, Event.STOPPED, Event.AWAITED, Event.STOPPED, Event.AWAITED, Event.PRESERVED],
            [Phase.CAPTURED, Phase.LEAVING, Phase.RETURNING, Phase.LEAVING, Phase.RETURNING, Phase.PRESERVING],
        ),
        ([Event.CAPTURED, Event.STOPPED, Event.ENDED], [Phase.CAPTURED, Phase.LEAVING, Phase.CAPTURED]),
        ([Event.AWAITED, Event.NOTED], [Phase.WAITING, Phase.CAPTURED]),
    ],
    ids=lambda value: "-".join(one.name.lower() for one in value),
)
def test_the_lives_of_pods(events: list[Event], phases: list[Phase]) -> None:
    current, seen = CurrentPhase(), []
    for event in events:
        current = current.after(event, 0.0)
        seen.append(current.phase)
    assert seen == phases
