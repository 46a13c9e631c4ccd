# SPDX-License-Identifier: Apache-2.0
"""Repairs are free until they come too often, then ever rarer, and free again after some quiet."""

from __future__ import annotations

from agent.core.policy.contention import (
    FREE,
    LONGEST,
    LOOK_PAUSE,
    LOOK_WINDOW,
    LOOKS,
    SHARE,
    SLOW,
    WINDOW,
    Contention,
)


def test_a_few_repairs_are_made_at_once() -> None:
    one = Contention()
    for second in range(FREE):
        assert not one.repaired(second) and one.pause(second) == 0


def test_rare_repairs_never_become_a_fight() -> None:
    one = Contention()
    assert not any(one.repaired(time) for time in range(0, 10_000, int(WINDOW)))


def test_a_fight_is_told_once_and_slows_down_up_to_a_limit() -> None:
    one, now, told, pauses = Contention(), 0.0, 0, []
    for _ in range(FREE + 10):
        told += one.repaired(now)
        pauses.append(one.pause(now))
        now += pauses[-1] + 0.01
    assert told == 1 and one.fights(now)
    assert not one.fights(now + 3 * LONGEST)
    assert pauses[FREE : FREE + 4] == [1.0, 2.0, 4.0, 8.0] and pauses[-1] == LONGEST
    assert one.pause(now + 3 * LONGEST) == 0
    assert not one.repaired(now + 3 * LONGEST) and one.pause(now + 3 * LONGEST) == 0


def test_who_changes_things_without_pause_is_looked_at_now_and_then() -> None:
    one, now, looks = Contention(), 0.0, 0
    while now < 60:
        if one.pause(now) == 0:
            one.looked(now)
            looks += 1
            now += 0.001
        else:
            now += one.pause(now)
            one.looked(now)
            looks += 1
    assert looks < 1.1 * 60 * LOOKS / LOOK_WINDOW
    assert one.pause(now + LOOK_WINDOW) == 0, "and at once again when it is quiet"
    assert LOOK_PAUSE < LOOK_WINDOW


def test_a_pod_whose_rules_take_long_pays_with_a_pause() -> None:
    one = Contention()
    one.worked(10.0, SLOW)
    assert one.pause(10.0) == 0
    one.worked(12.0, 2.0)
    assert one.pause(12.0) == SHARE * 2.0 and one.pause(12.0 + SHARE * 2.0) == 0
    one.worked(30.0, 60.0)
    assert one.pause(30.0) == LONGEST


def test_slow_repairs_are_a_fight_too() -> None:
    """The pause after slow work made six repairs last longer than the window, and the conflict was never reported."""
    one, now, told = Contention(), 0.0, []
    for _ in range(FREE + 2):
        now += max(one.pause(now), 0.01) + 2.0
        one.worked(now, 2.0)
        told.append(one.repaired(now))
    assert told.index(True) == FREE and sum(told) == 1


def test_slow_but_rare_repairs_are_no_fight() -> None:
    one, now = Contention(), 0.0
    for _ in range(20):
        now += 4 * WINDOW
        one.worked(now, 2.0)
        assert not one.repaired(now)
