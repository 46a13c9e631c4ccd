"""When a pod is due for its probe. What a probe does is shown in tests/netns."""

from __future__ import annotations

import pytest

from agent.core.canary import Finding, Verdict
from agent.sources.canary import WINDOW, Canary


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def canary(clock: Clock) -> Canary:
    made = Canary("169.254.7.127", "fd16::1", clock=clock)
    made.enrolled("u")
    return made


@pytest.mark.parametrize("verdict", [Verdict.OK, Verdict.FAILED, Verdict.CAPTURED])
def test_a_pod_is_due_until_it_was_probed(canary: Canary, verdict: Verdict) -> None:
    assert canary.due("u") and canary.due("u") and not canary.due("other")
    canary.done("u", Finding(verdict))
    assert not canary.due("u")


def test_a_pod_without_listener_stays_due_for_a_while(canary: Canary, clock: Clock) -> None:
    canary.done("u", Finding(Verdict.NO_LISTENER))
    clock.now += WINDOW
    assert canary.due("u")
    clock.now += 0.1
    assert not canary.due("u")
    canary.enrolled("u")  # anew
    assert canary.due("u")


def test_a_pod_that_is_gone_is_not_due(canary: Canary) -> None:
    canary.forget("u")
    canary.forget("u")
    assert not canary.due("u")
