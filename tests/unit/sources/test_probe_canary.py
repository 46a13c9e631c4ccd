# SPDX-License-Identifier: Apache-2.0
"""When a pod is due for its probe. What a probe does is shown in tests/netns."""

from __future__ import annotations

import pytest

from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.sources.probe_canary import WINDOW, ProbeCanary


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def canary(clock: Clock) -> ProbeCanary:
    made = ProbeCanary("169.254.7.127", "fd16::1", clock=clock)
    made.enrolled("u")
    return made


@pytest.mark.parametrize("verdict", [ProbeVerdict.OK, ProbeVerdict.FAILED, ProbeVerdict.CAPTURED])
def test_a_pod_is_due_until_it_was_probed(canary: ProbeCanary, verdict: ProbeVerdict) -> None:
    assert canary.due("u") and canary.due("u") and not canary.due("other")
    canary.done("u", ProbeResult(verdict))
    assert not canary.due("u")


def test_a_pod_without_listener_stays_due_for_a_while(canary: ProbeCanary, clock: Clock) -> None:
    canary.done("u", ProbeResult(ProbeVerdict.NO_LISTENER))
    clock.now += WINDOW
    assert canary.due("u")
    clock.now += 0.1
    assert not canary.due("u")
    canary.enrolled("u")  # anew
    assert canary.due("u")


def test_a_pod_that_is_gone_is_not_due(canary: ProbeCanary) -> None:
    canary.forget("u")
    canary.forget("u")
    assert not canary.due("u")
