# SPDX-License-Identifier: Apache-2.0
"""A stalled ztunnel in the states of pods: it is no failure of the capture, and passes do not hide it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.world import World, play, pod

from agent.core.model.status import State
from agent.core.policy.accept_queue import NOTHING_WAITS, PATIENCE, AcceptQueue, QueueReading
from agent.reconciler import stall_watch
from agent.reconciler.stall_watch import StallWatch

WAITS = QueueReading((AcceptQueue(15001, 7, 1),), frozenset({1}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The watch's clock, and no reading but the script's."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stall_watch, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(stall_watch, "SOON", 3600.0)
    return made


async def look(world: World, clock: SimpleNamespace, *uids: str) -> None:
    """Two readings, PATIENCE apart, by a watch of the same entries."""
    watch = world.reconciler._stalls
    assert isinstance(watch, StallWatch)
    for _ in range(2):
        await watch.look(uids)
        clock.now += PATIENCE


def state(world: World, uid: str) -> State:
    return world.reconciler.status(uid).state


def test_the_state_says_so_until_ztunnel_accepts_whatever_passes_do(clock: SimpleNamespace) -> None:
    async def script(world: World) -> None:
        await world.settle(pod(), pod("other"))
        world.listening.queues["web"] = WAITS
        await look(world, clock, "web", "other")
        assert [state(world, uid) for uid in ("web", "other")] == [State.STALLED, State.ENABLED]
        assert "has not accepted connections since" in world.reconciler.status("web").error
        (passed,) = await world.settle(pod())
        assert passed.state is State.ENABLED  # a CNI ADD does not fail for it
        assert state(world, "web") is State.STALLED
        world.listening.queues["web"] = NOTHING_WAITS
        await look(world, clock, "web", "other")
        assert state(world, "web") is State.ENABLED
        assert world.reconciler.status("web").error == ""
        assert world.journal.stalls == [("web", False), ("web", True)]

    play(script, listens=True)


def test_a_pod_that_left_the_mesh_or_lost_ztunnel_is_not_stalled(clock: SimpleNamespace) -> None:
    async def script(world: World) -> None:
        await world.settle(pod(), pod("lost"))
        world.listening.queues |= {"web": WAITS, "lost": WAITS}
        await look(world, clock, "web", "lost")
        await world.let_go(pod(enrolled=False))
        world.listening.deaf = True
        await world.settle(pod("lost"))
        await look(world, clock, "web", "lost")
        assert [state(world, uid) for uid in ("web", "lost")] == [State.EXCLUDED, State.PENDING]
        assert ("web", True) not in world.journal.stalls
        world.listening.deaf = False
        await world.settle(pod(), pod("lost"))
        assert [state(world, uid) for uid in ("web", "lost")] == [State.ENABLED, State.ENABLED]

    play(script, listens=True)
