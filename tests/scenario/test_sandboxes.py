# SPDX-License-Identifier: Apache-2.0
"""Sandboxes that begin and end: lo is down, and failures that a sandbox's end may explain."""

from __future__ import annotations

from typing import Any

import pytest
from support.world import World, play, pod

from agent.core.errors import ForeignNetnsError, KernelError
from agent.core.model.status import State
from agent.reconciler import pod_state


def test_lo_is_brought_up_in_a_sandbox_that_is_just_being_made() -> None:
    async def script(world: World) -> None:
        world.namespaces.resolve(pod()).up = False
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED and world.target("web").up

    play(script)


def test_a_sandbox_that_ends_is_neither_repaired_nor_told_of() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        target = world.target("web")
        target.up = target.occupied = False
        world.kernel.damage("routing", target)  # lo takes its routes along
        world.kernel.log.clear()
        world.reconciler.wake("web", "loopback[7]")
        status = await world.reconciler.settled("web")
        assert status.state is State.ENABLED and "is ending" in status.notes[0]
        (status,) = await world.settle(pod(terminal=True))
        assert status.state is State.EXCLUDED
        assert world.kernel.log == [] and world.journal.errors == [] and world.reconciler.repairs("web") == []
        target.up = True
        assert (await world.reconciler.settled("web")).leaving, "it runs after all"

    play(script)


def test_a_sandbox_that_ends_while_it_is_repaired_has_not_failed() -> None:
    async def script(world: World) -> None:
        def end(target: Any) -> None:
            target.up = target.occupied = False
            raise KernelError("ip -6 route add", 100, "Network is down")

        await world.settle(pod())
        world.kernel.damage("routing", world.target("web"))
        world.routing.before_apply = end
        status = await world.reconciler.settled("web")
        assert status.state is State.ENABLED and "is ending" in status.notes[0]
        assert world.journal.errors == []

    play(script)


def refuse(world: World, number: int = 100, words: str = "Network is down") -> None:
    """The routing layer drifts, and the kernel refuses each repair of it."""

    def refused(_: Any) -> None:
        raise KernelError("ip route add", number, words)

    world.routing.before_apply = refused
    world.kernel.damage("routing", world.target("web"))


def accept(world: World) -> None:
    world.routing.before_apply = lambda _: None


async def until_failed(world: World) -> None:
    while world.reconciler.status("web").state is not State.FAILED:
        await world.reconciler.progressed()  # by itself


def test_a_pod_whose_processes_outlive_lo_by_a_moment_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.01)

    async def script(world: World) -> None:
        await world.settle(pod())
        target = world.target("web")
        target.up = False
        refuse(world)
        status = await world.reconciler.settled("web")
        assert (status.state, status.error, status.notes) == (State.ENABLED, "", ())
        target.occupied = False
        while not world.reconciler.status("web").notes:
            await world.reconciler.progressed()  # by itself
        assert "is ending" in world.reconciler.status("web").notes[0]
        world.table.gone("web")
        await world.reconciler.forget("web")
        assert world.journal.errors == [] and world.kernel.log[-1] == "release web"

    play(script)


def test_lo_that_the_pod_took_down_itself_is_reported_until_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_SECONDS", 0.1)
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.02)

    async def script(world: World) -> None:
        await world.settle(pod())
        world.target("web").up = False
        refuse(world)
        assert (await world.reconciler.settled("web")).state is State.ENABLED and world.journal.errors == []
        await until_failed(world)
        assert world.journal.errors == ["ip route add: Network is down"]
        status = await world.reconciler.settled("web")
        assert status.state is State.FAILED and status.retry is not None, "it is not tolerated again"
        world.target("web").up = True
        accept(world)
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()
        refuse(world)
        world.target("web").up = False
        errors = len(world.journal.errors)
        assert (await world.reconciler.settled("web")).state is State.ENABLED
        assert len(world.journal.errors) == errors, "another time is another case"

    play(script)


@pytest.mark.parametrize(
    ("number", "words", "tolerated"),
    [(19, "No such device", True), (2, "No such file", True), (1, "Operation not permitted", False)],
)
def test_an_interface_that_is_gone_may_mean_the_end_and_other_failures_do_not(
    number: int, words: str, tolerated: bool
) -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        refuse(world, number, words)
        status = await world.reconciler.settled("web")
        assert status.state is (State.ENABLED if tolerated else State.FAILED)
        assert world.journal.errors == ([] if tolerated else [f"ip route add: {words}"])

    play(script)


def test_a_captured_pod_may_lose_its_addresses_before_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.01)

    async def script(world: World) -> None:
        await world.settle(pod())
        world.namespaces.failures["web"] = ForeignNetnsError("pod shop/web: holds none of its addresses")
        assert (await world.reconciler.settled("web")).state is State.ENABLED
        world.namespaces.gone.add("web")
        while world.table.get("web") is not None:
            await world.reconciler.progressed()  # by itself
        assert world.journal.errors == ["pod shop/web: gone"]

    play(script)


def test_a_pod_that_leaves_while_its_lo_is_down_does_so_when_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.01)

    async def script(world: World) -> None:
        await world.settle(pod())
        world.target("web").up = False
        refuse(world)
        (status,) = await world.settle(pod(enrolled=False))
        assert status.error == "" and world.journal.errors == []
        world.target("web").up = True
        accept(world)
        await world.let_go(pod(enrolled=False))
        assert world.held("rules", "web") is None and world.journal.errors == []

    play(script)


def test_a_new_pod_whose_interface_is_gone_has_failed_at_once() -> None:
    """The caller of its CNI ADD waits for the result."""

    async def script(world: World) -> None:
        world.routing.failures = [KernelError("ip route add", 19, "No such device")]
        (status,) = await world.settle(pod())
        assert status.state is State.FAILED and world.journal.errors == ["ip route add: No such device"]

    play(script)
