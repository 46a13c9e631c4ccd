# SPDX-License-Identifier: Apache-2.0
"""What waits for a pod's workload: how many, how long, and what ends it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agent.ztunnel.relay import held_connections
from agent.ztunnel.relay.held_connections import HeldConnections
from agent.ztunnel.relay.pod_context import SMALL_PART
from agent.ztunnel.relay.poller import Poller


class World:
    def __init__(self) -> None:
        self.poller = Poller()
        self.known: set[str] = set()
        self.room = HeldConnections(self.poller, lambda pod: pod.uid in self.known)
        self.said: list[str] = []

    def pod(self, uid: str) -> Any:
        return SimpleNamespace(uid=uid, live=set(), engine=SimpleNamespace(share=2 * SMALL_PART))

    def hold(self, pod: Any, name: str) -> bool:
        return self.room.hold(pod, lambda: self.said.append(name), lambda: self.said.append(f"{name} dropped"))


@pytest.fixture
def world() -> World:
    return World()


def test_only_the_pods_that_became_known_go_on(world: World) -> None:
    one, other = world.pod("one"), world.pod("other")
    assert world.hold(one, "a") and world.hold(one, "b") and world.hold(other, "c")
    world.room.changed()
    assert world.said == []
    world.known.add("one")
    world.room.changed()
    assert world.said == ["a", "b"] and (len(one.live), len(other.live)) == (0, 1)
    assert not world.hold(one, "d")


def test_the_time_is_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_connections, "HELD_SECONDS", 0.05)
    world.room = HeldConnections(world.poller, lambda _: False)
    assert world.hold(world.pod("one"), "a")
    world.poller.loop.call_later(0.2, world.poller.loop.stop)
    world.poller.loop.run_forever()
    assert world.said == ["a"]


def test_one_pod_has_a_share_and_another_one_its_own(world: World) -> None:
    one = world.pod("one")
    assert [world.hold(one, name) for name in "abc"] == [True, True, False]
    assert world.hold(world.pod("other"), "d")


def test_the_end_of_the_pod_drops_it_once(world: World) -> None:
    one = world.pod("one")
    assert world.hold(one, "a")
    for live in tuple(one.live):
        live.abort()
    world.known.add("one")
    world.room.changed()
    assert world.said == ["a dropped"] and not one.live
