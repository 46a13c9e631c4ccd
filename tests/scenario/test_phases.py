# SPDX-License-Identifier: Apache-2.0
"""A pod that leaves the mesh and is enrolled again before its last rules are removed, with and without a ztunnel."""

from __future__ import annotations

import pytest
from support.world import World, play, pod

from agent.core.model.redirect import Redirect
from agent.core.model.status import State
from agent.core.policy.phases import LIMITS, Phase


def rules(world: World) -> Redirect:
    found = world.held("rules", "web")
    assert isinstance(found, Redirect)
    return found


async def returning(world: World) -> None:
    """A captured pod leaves while ztunnel proxies a connection; ztunnel ends, and the pod is enrolled again."""
    await world.settle(pod())
    world.proxied.carries.add("web")
    (status,) = await world.settle(pod(enrolled=False))
    assert (status.state, status.leaving, rules(world).draining) == (State.EXCLUDED, True, True)
    world.publisher.connected = False
    (status,) = await world.settle(pod())
    assert status.state is State.WAITING and "no ztunnel" in status.error


def test_a_pod_that_returns_without_a_ztunnel_keeps_its_draining_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of its leaving does not count any more: it would remove the rules."""
    monkeypatch.setitem(LIMITS, Phase.LEAVING, 0.0)

    async def script(world: World) -> None:
        await returning(world)
        for _ in range(3):
            assert (await world.reconciler.settled("web")).state is State.WAITING
            assert rules(world).draining and "web" in world.publisher.published
        assert await world.reconciler.inspect(pod()) == {}, "rules that drain are no drift"
        assert "reset web" not in world.kernel.log

    play(script)


def test_a_pod_that_returns_is_captured_when_ztunnel_is_back() -> None:
    async def script(world: World) -> None:
        await returning(world)
        world.outside.there["web"] = {7}  # opened while no new connection was captured
        world.publisher.connected = True
        await world.reconciler.acknowledged("web")
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()
        status = world.reconciler.status("web")
        assert (status.leaving, status.outside) == (False, 1)
        assert rules(world).preserve and not rules(world).draining
        assert "reset web" not in world.kernel.log

    play(script)


def test_a_pod_that_returns_does_not_wait_for_ztunnel_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, Phase.RETURNING, 0.0)

    async def script(world: World) -> None:
        await world.settle(pod())
        await world.settle(pod(enrolled=False))
        world.publisher.connected = False
        (status,) = await world.settle(pod())
        assert status.state is State.PENDING and not rules(world).draining, "captured, and refused"

    play(script)


def test_a_pod_that_returns_and_leaves_again_ends_like_one_that_leaves() -> None:
    async def script(world: World) -> None:
        await returning(world)
        (status,) = await world.settle(pod(enrolled=False))
        assert (status.state, status.leaving) == (State.EXCLUDED, True)
        await world.reconciler.settled("web")
        assert rules(world).draining, "ztunnel still proxies a connection"
        world.proxied.carries.clear()
        while world.reconciler.status("web").leaving:
            await world.reconciler.progressed()
        assert world.held("rules", "web") is None and "web" not in world.publisher.published

    play(script)
