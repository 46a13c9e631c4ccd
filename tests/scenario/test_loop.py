# SPDX-License-Identifier: Apache-2.0
"""Races of forgetting and waiting in the reconciler's loop, beside the step scripts of test_reconciler."""

from __future__ import annotations

import asyncio

import pytest
from support.world import Accounting, World, play, pod

from agent.core.model.redirect import Redirect
from agent.core.model.status import State


async def forgotten_soon(world: World) -> asyncio.Task[None]:
    """The pod has ended, and the loop has not looked at that yet."""
    world.table.gone("web")
    forgetting = asyncio.create_task(world.reconciler.forget("web"))
    await asyncio.sleep(0)
    assert not forgetting.done()
    return forgetting


def test_a_waiter_that_gave_up_does_not_keep_the_pod_from_being_forgotten() -> None:
    async def script(world: World) -> None:
        world.publisher.hold = asyncio.Event()
        world.table.seen(pod())
        world.reconciler.wake("web")
        while "rules set web" not in world.kernel.log:  # noqa: ASYNC110 - kernel work alone tells nobody
            await asyncio.sleep(0)
        impatient = asyncio.create_task(world.reconciler.settled("web"))
        await asyncio.sleep(0)
        impatient.cancel()
        forgetting = await forgotten_soon(world)
        world.publisher.hold.set()
        await forgetting
        (status,) = await world.settle(pod(netns_path="/run/netns/again"))
        assert status.state is State.ENABLED
        assert world.held("rules", "web") is not None

    play(script)


def test_back_before_it_was_forgotten_is_not_answered_with_the_old_state() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        before = world.target("web")
        forgetting = await forgotten_soon(world)
        (status,) = await world.settle(pod(netns_path="/run/netns/again"))
        assert status.state is State.ENABLED
        assert world.target("web") is not before and world.held("rules", "web") is not None
        await forgetting
        assert world.publisher.published == {"web"}

    play(script)


def test_back_before_it_was_forgotten_is_captured_also_when_nobody_waits() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        forgetting = await forgotten_soon(world)
        world.table.seen(pod(netns_path="/run/netns/again"))
        world.reconciler.wake("web")
        await forgetting
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()
        assert world.held("rules", "web") is not None

    play(script)


def test_what_cannot_be_released_is_tried_again_and_nobody_is_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        release, refusals = world.namespaces.release, iter([OSError(16, "busy")])

        def busy_once(uid: str) -> None:
            for error in refusals:
                raise error
            release(uid)

        monkeypatch.setattr(world.namespaces, "release", busy_once)
        await (await forgotten_soon(world))
        while "release web" not in world.kernel.log:
            await world.reconciler.progressed()

    play(script)


def test_whoever_waits_for_a_pod_that_ended_is_not_told_what_was_true_before() -> None:
    async def script(world: World) -> None:
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED
        world.namespaces.gone.add("web")
        status = await world.reconciler.settled("web")
        assert (status.state, status.error) == (State.FAILED, "pod shop/web: gone")

    play(script)


def test_forgetting_what_nobody_knows_and_inspecting_what_was_forgotten_leave_nothing() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        await world.reconciler.forget("other")
        await (await forgotten_soon(world))
        await world.reconciler.inspect(pod())
        assert world.reconciler.synced  # no entry that no pass will ever look at

    play(script)


def test_rules_of_a_predecessor_are_not_touched() -> None:
    async def script(world: World) -> None:
        target = world.namespaces.resolve(pod())
        world.kernel.held.update({("rules", target): Redirect(), ("routing", target): Redirect()})
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED
        assert world.kernel.log == ["publish web"]

    play(script)


def test_a_pod_that_a_predecessor_captured_is_set_free_backwards_then_of_retired_layers() -> None:
    async def script(world: World) -> None:
        target = world.namespaces.resolve(pod())
        world.namespaces.captured.add("web")
        world.kernel.held.update({(name, target): Redirect() for name in ("rules", "routing", "old")})
        await world.let_go(pod(enrolled=False))
        assert world.reconciler.status("web").state is State.EXCLUDED and world.namespaces.captured == set()
        assert [line for line in world.kernel.log if "clear" in line] == [
            "rules clear web", "routing clear web", "old clear web",
        ]  # fmt: skip

    play(script)


def test_a_changed_want_is_no_drift() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        without = {"istio.io/dataplane-mode": "ambient", "ambient.istio.io/dns-capture": "false"}
        await world.settle(pod(annotations=without))
        assert world.held("rules", "web") == Redirect(dns=False)
        assert world.reconciler.repairs("web") == [] and set(world.journal.causes) == {""}

    play(script)


def test_passes_that_wait_for_ztunnel_hold_up_no_kernel_work() -> None:
    async def script(world: World) -> None:
        world.publisher.hold = asyncio.Event()
        waiting = [asyncio.create_task(world.settle(pod(f"p{number}"))) for number in range(20)]
        while sum(line.startswith("rules set") for line in world.kernel.log) < 20:  # noqa: ASYNC110 - more than there are workers
            await asyncio.sleep(0)
        assert world.publisher.published == set()
        world.publisher.hold.set()
        assert {status.state for (status,) in await asyncio.gather(*waiting)} == {State.ENABLED}

    play(script)


async def watched(world: World, accounting: Accounting) -> None:
    """The pod has had its second pass, and what accounting does then has begun."""
    for _ in range(2):
        await world.settle(pod())
    while "web" not in accounting.watching:  # noqa: ASYNC110 - a thread tells nobody
        await asyncio.sleep(0.001)


def test_what_accounting_waits_for_keeps_no_other_pod_from_being_captured() -> None:
    accounting = Accounting()

    async def script(world: World) -> None:
        await watched(world, accounting)
        for _ in range(2):
            (status,) = await world.settle(pod("other"))
            assert status.state is State.ENABLED
        assert not accounting.watched
        accounting.open.set()
        while accounting.watched != {"web", "other"}:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)

    play(script, accounting=accounting)


def test_a_pod_that_ends_meanwhile_is_let_go_afterwards() -> None:
    accounting = Accounting()

    async def script(world: World) -> None:
        await watched(world, accounting)
        await world.settle(pod("other"))
        await world.settle(pod("other"))  # its turn comes after the first one's
        forgetting = await forgotten_soon(world)
        world.table.gone("other")
        await world.reconciler.forget("other")
        assert not forgetting.done()
        accounting.open.set()
        await forgetting
        assert world.reconciler.status("web").state is State.WAITING
        await asyncio.sleep(0.01)
        assert accounting.watching == {"web"}

    play(script, accounting=accounting)


async def states(world: World) -> set[State]:
    """Those that the pod has while it is settled once more, first of all by this agent."""
    seen = set[State]()
    world.table.seen(pod())
    settling = asyncio.create_task(world.reconciler.settled("web"))
    while not settling.done():
        await world.reconciler.progressed()
        seen.add(world.reconciler.status("web").state)
    return seen | {(await settling).state}


def test_while_ztunnel_listens_in_a_pod_it_is_enabled_whoever_is_connected_to_whom() -> None:
    async def script(world: World) -> None:
        world.listening.pods.add("web")
        world.publisher.connected = False
        assert await states(world) == {State.ENABLED}
        status = world.reconciler.status("web")
        assert "no ztunnel is connected" in status.notes[0] and status.retry is not None
        world.listening.deaf = True
        assert (await world.reconciler.settled("web")).state is State.PENDING

    play(script, listens=True)


def test_a_pod_in_which_nothing_listens_yet_is_pending_until_ztunnel_has_it() -> None:
    async def script(world: World) -> None:
        world.publisher.connected = False
        assert await states(world) == {State.PENDING}
        world.publisher.connected = True
        await world.reconciler.acknowledged("web")
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()

    play(script, listens=True)


@pytest.mark.parametrize("noticed", ["by the kernel", "by a verification"])
def test_what_another_agent_programs_in_a_retired_layer_later_goes_too(noticed: str) -> None:
    """As istio-cni does with iptables while both agents run: a pass does not look at retired layers each time."""

    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.damage("old", world.target("web"))
        await world.settle(pod())
        if noticed == "by the kernel":
            world.reconciler.wake("web", "iptables-restore[7]")
        else:
            assert "old" in await world.reconciler.inspect(world.table.get("web"))
        while "old clear web" not in world.kernel.log:
            await world.reconciler.progressed()
        assert world.held("rules", "web") is not None and not await world.reconciler.inspect(world.table.get("web"))

    play(script)
