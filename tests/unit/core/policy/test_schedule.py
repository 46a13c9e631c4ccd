# SPDX-License-Identifier: Apache-2.0
"""Due times: at once when woken, later and later after failures, regularly otherwise; never twice at once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.core.policy.schedule import FIRST_RETRY, LAST_RETRY, MOMENTS, Schedule

PERIOD = 40.0


@pytest.fixture
def schedule() -> Schedule:
    return Schedule(PERIOD, lambda: 0.5)


def test_a_woken_key_is_due_at_once_and_handed_out_once(schedule: Schedule) -> None:
    assert schedule.next_due() is None
    schedule.wake("a", 1.0)
    schedule.wake("a", 2.0)
    assert schedule.next_due() == 1.0
    assert schedule.take(0.9, 9) == []
    assert schedule.take(1.0, 9) == ["a"]
    assert schedule.take(99.0, 9) == []
    assert schedule.next_due() is None


@pytest.mark.parametrize(("random", "factor"), [(0.0, 0.75), (0.5, 1.0), (0.999, 1.25)])
def test_after_success_it_is_verified_within_the_spread_of_the_period(random: float, factor: float) -> None:
    schedule = Schedule(PERIOD, lambda: random)
    schedule.wake("a", 0)
    schedule.take(0, 1)
    assert schedule.ended("a", 10, ok=True) == pytest.approx(PERIOD * factor, rel=0.01)
    assert schedule.next_due() == pytest.approx(10 + PERIOD * factor, rel=0.01)


@pytest.mark.parametrize("now", [0.0, 0.1, 1.0, 1.25, 2.4, 1234.56789])
@pytest.mark.parametrize("random", [0.0, 0.03, 0.5, 0.96875, 0.999])
def test_no_verification_comes_before_or_after_its_spread(now: float, random: float) -> None:
    schedule = Schedule(PERIOD, lambda: random)
    schedule.wake("a", now)
    schedule.take(now, 1)
    delay = schedule.ended("a", now, ok=True)
    assert delay is not None and 0.75 * PERIOD <= delay <= 1.25 * PERIOD


def test_what_is_verified_at_about_the_same_time_is_verified_together() -> None:
    numbers = iter(range(100))
    schedule = Schedule(PERIOD, lambda: next(numbers) / 100)
    for number in range(100):
        schedule.wake(str(number), 0)
    for key in schedule.take(0, 100):
        schedule.ended(key, 1.3, ok=True)
    together = []
    while (due := schedule.next_due()) is not None:
        together.append((due, len(schedule.take(due, 100))))
    moments = [due for due, _ in together]
    assert moments == [PERIOD * (12 + number) / MOMENTS for number in range(1, 9)]
    assert sum(count for _, count in together) == 100
    assert min(count for _, count in together) > 10


@pytest.mark.parametrize(("random", "factor"), [(0.0, 0.5), (0.999, 1.0)])
def test_failures_double_the_wait_within_its_jitter_up_to_a_bound(random: float, factor: float) -> None:
    schedule = Schedule(PERIOD, lambda: random)
    schedule.wake("a", 0)
    now, waits = 0.0, []
    for _ in range(40):
        assert schedule.take(now, 1) == ["a"]
        wait = schedule.ended("a", now, ok=False)
        assert wait is not None
        waits.append(wait)
        now += wait
    wanted = [min(LAST_RETRY, FIRST_RETRY * 2**number) * factor for number in range(40)]
    assert waits == pytest.approx(wanted, rel=0.01)


def run(schedule: Schedule, now: float, *, ok: bool, wake: bool = False) -> float | None:
    schedule.wake("a", now)
    assert schedule.take(now, 1) == ["a"]
    if wake:
        schedule.wake("a", now)
    return schedule.ended("a", now, ok=ok)


def test_success_starts_the_waits_anew(schedule: Schedule) -> None:
    first = run(schedule, 0, ok=False)
    assert run(schedule, 1, ok=False) == 2 * (first or 0)
    run(schedule, 2, ok=True)
    assert run(schedule, 3, ok=False) == first
    run(schedule, 4, ok=True, wake=True)
    assert run(schedule, 5, ok=False) == first  # also when it was woken meanwhile


def test_woken_while_it_runs_it_is_due_again_as_soon_as_it_ends(schedule: Schedule) -> None:
    for ok in (True, False):
        assert run(schedule, 5, ok=ok, wake=True) == 0.0
        assert schedule.take(5, 1) == ["a"]
        assert schedule.ended("a", 5, ok=True) == PERIOD  # once


def test_a_wake_cuts_a_wait_short(schedule: Schedule) -> None:
    run(schedule, 0, ok=True)
    schedule.wake("a", 1)
    assert schedule.take(1, 1) == ["a"]


def test_the_longest_waiting_come_first(schedule: Schedule) -> None:
    for key, now in (("c", 3), ("a", 1), ("b", 2), ("d", 9)):
        schedule.wake(key, now)
    assert schedule.take(5, 2) == ["a", "b"]
    assert schedule.take(5, 2) == ["c"]


def test_dropped(schedule: Schedule) -> None:
    schedule.wake("a", 0)
    schedule.drop("a")
    schedule.drop("a")
    assert schedule.take(1, 1) == []
    assert schedule.ended("a", 1, ok=True) is None


def test_dropped_while_it_runs(schedule: Schedule) -> None:
    schedule.wake("a", 0)
    schedule.take(0, 1)
    schedule.drop("a")
    assert schedule.ended("a", 1, ok=True) is None
    assert schedule.next_due() is None


def test_dropped_and_woken_while_it_runs_it_waits_for_the_end_of_that_pass(schedule: Schedule) -> None:
    schedule.wake("a", 0)
    schedule.take(0, 1)
    schedule.drop("a")
    schedule.wake("a", 1)
    assert schedule.take(1, 1) == []
    assert schedule.ended("a", 2, ok=True) == 0.0
    assert schedule.take(2, 1) == ["a"]


keys = st.sampled_from("abc")


class Passes(RuleBasedStateMachine):
    """A woken key is due until it is handed out or dropped; a key that runs is never handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.random = 0.0, 0.5
        self.schedule = Schedule(PERIOD, lambda: self.random)
        self.running: set[str] = set()
        self.woken: set[str] = set()  # since the last pass began
        self.known: set[str] = set()

    @rule(seconds=st.floats(0, 60), random=st.floats(0, 0.999))
    def time_goes_on(self, seconds: float, random: float) -> None:
        self.now, self.random = self.now + seconds, random

    @rule(key=keys)
    def wake(self, key: str) -> None:
        self.schedule.wake(key, self.now)
        self.woken.add(key)
        self.known.add(key)

    @rule(key=keys)
    def drop(self, key: str) -> None:
        self.schedule.drop(key)
        self.woken.discard(key)
        self.known.discard(key)

    @rule(most=st.integers(1, 3))
    def take(self, most: int) -> None:
        taken = self.schedule.take(self.now, most)
        assert len(taken) == len(set(taken)) <= most
        assert not self.running & set(taken)
        assert set(taken) <= self.known
        if len(taken) < most:
            assert self.woken - self.running <= set(taken)
        self.running |= set(taken)
        self.woken -= set(taken)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.booleans())
    def ended(self, data: st.DataObject, ok: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(key)
        delay = self.schedule.ended(key, self.now, ok=ok)
        if key not in self.known:
            assert delay is None
        elif key in self.woken:
            assert delay == 0
        elif ok:
            assert delay is not None and 0.75 * PERIOD <= delay <= 1.25 * PERIOD
        else:
            assert delay is not None and FIRST_RETRY / 2 <= delay <= LAST_RETRY

    @invariant()
    def whoever_waits_has_a_time(self) -> None:
        due = self.schedule.next_due()
        assert (due is None) == (not self.known - self.running)
        if self.woken - self.running:
            assert due is not None and due <= self.now


TestPasses = Passes.TestCase
TestPasses.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
