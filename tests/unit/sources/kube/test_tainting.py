# SPDX-License-Identifier: Apache-2.0
"""P05: the taint goes when capture works, and not before; it comes back only if the setting says so."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from agent.core.errors import KubeError
from agent.sources.kube import tainting
from agent.sources.kube.node_taints import Taint
from agent.sources.kube.tainting import Tainting

TAINT = Taint.parse("sluice.io/not-ready")
LOOKS = int(tainting._STEADY / tainting._EVERY)


class Node:
    def __init__(self) -> None:
        self.tainted, self.failing, self.calls = True, False, 0

    async def remove(self, taint: Taint) -> bool:
        return self._be(False)

    async def add(self, taint: Taint) -> bool:
        return self._be(True)

    def _be(self, tainted: bool) -> bool:
        self.calls += 1
        if self.failing:
            raise KubeError("forbidden", 403)
        changed, self.tainted = self.tainted != tainted, tainted
        return changed


class World:
    def __init__(self, *, returns: bool) -> None:
        self.node, self.lacking, self.stalled = Node(), "no ztunnel is connected", ""
        self.tainting = Tainting(self.node, TAINT, returns=returns)

    def look(self, times: int = 1) -> bool:
        async def run() -> None:
            for _ in range(times):
                await self.tainting.look(self.lacking, self.stalled)

        asyncio.run(run())
        return self.node.tainted


def test_p05_it_goes_when_capture_works_and_not_before() -> None:
    world = World(returns=False)
    assert world.look(3 * LOOKS) and world.node.calls == 0
    world.lacking = ""
    assert not world.look(3) and world.node.calls == 1
    world.lacking = "broken"
    assert not world.look(3 * LOOKS) and world.node.calls == 1


def test_p05_it_comes_back_when_capture_fails_for_a_while_and_the_setting_says_so() -> None:
    world = World(returns=True)
    world.lacking = ""
    assert not world.look()
    world.lacking = "no ztunnel is connected"
    assert not world.look(LOOKS - 1)
    assert world.look(2)
    world.lacking = ""
    assert not world.look()


def test_it_comes_back_for_a_stalled_ztunnel_alone() -> None:
    """Whether a stall counts is decided by `run`, as the setting says."""
    world = World(returns=False)
    world.lacking = ""
    assert not world.look()
    world.stalled = "ztunnel has stalled"
    assert not world.look(LOOKS - 1)
    assert world.look(2)
    world.lacking, world.stalled = "the API server is away", ""
    assert world.look(2 * LOOKS)  # not removed while a pod could start uncaptured
    world.lacking = ""
    assert not world.look()


@pytest.mark.parametrize("counts", [True, False])
def test_a_stall_counts_only_if_the_setting_says_so(counts: bool) -> None:
    seen = list[str]()

    async def run() -> None:
        one = Tainting(Node(), TAINT, returns=False, stalled=counts)

        async def look(lacking: str, stalled: str = "") -> None:
            seen.append(stalled)
            raise asyncio.CancelledError

        one.look = look  # type: ignore[method-assign]
        await one.run(lambda: "", lambda: "ztunnel has stalled")

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run())
    assert seen == ["ztunnel has stalled" if counts else ""]


def test_p05_an_agent_that_starts_where_it_cannot_capture_puts_it_back() -> None:
    world = World(returns=True)
    world.node.tainted = False
    assert world.look(LOOKS)


def test_an_api_that_refuses_is_told_of_and_asked_again() -> None:
    world = World(returns=False)
    world.lacking, world.node.failing = "", True
    assert world.look(2) and world.node.calls == 2
    assert world.tainting.error == "the taint sluice.io/not-ready:NoSchedule: forbidden"
    world.node.failing = False
    assert not world.look() and world.tainting.error == ""
