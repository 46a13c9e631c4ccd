# SPDX-License-Identifier: Apache-2.0
"""Changes between capture by translation and by socket; and what the node holds of pods that are gone."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from support.fakekernel import Target
from support.world import World, play, pod

from agent.core.errors import KernelError
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.model.status import State
from agent.reconciler import pod_state
from agent.reconciler.loop import Reconciler

WEB = replace(pod(), source="static")
BEFORE = Redirect(dns=False)  # what the old layer makes true in the pod


def held(world: World, layer: str, uid: str = "web") -> Redirect | None:
    found = world.held(layer, uid)
    assert not isinstance(found, str)
    return found


def captured(world: World, *cookies: int, one: Pod = WEB) -> None:
    """By the old layer, with these connections."""
    world.kernel.held["old", world.namespaces.resolve(one)] = BEFORE
    world.namespaces.remember(one, captured=True)
    world.carried.there[one.uid] = set(cookies)


def restarted(world: World) -> Reconciler:
    """Another process over the same kernel, which has the notes alone."""
    old = world.reconciler
    world.carried.known = {uid: set(noted) for uid, noted in world.namespaces.carried.items()}
    made = Reconciler(
        settings=old.settings,
        table=world.table,
        choice=old.choice,
        namespaces=world.namespaces,
        publisher=world.publisher,
        watcher=world.watcher,
        journal=world.journal,
        random=lambda: 0.5,
        preexisting=world.outside,
        preswitch=world.carried,
        await_packets=world.await_packets,
    )
    for one in world.table:
        made.wake(one.uid)
    return made


def test_rules_drain_while_connections_last_that_they_translate_and_then_go() -> None:
    async def script(world: World) -> None:
        captured(world, 7, 8)
        (status,) = await world.settle(WEB)
        assert status.state is State.ENABLED
        assert world.kernel.log == ["routing set web", "rules set web", "grace", "old set web", "publish web"]
        old, rules = held(world, "old"), held(world, "rules")
        assert old is not None and old.draining and old.marks
        assert rules is not None and not rules.draining and held(world, "routing") == rules and rules.marks
        assert world.namespaces.carried["web"] == (7, 8), "a later process finds them again"
        assert "carried on as before: 10.0.0.2:5000" in status.notes[0] and status.notes[0].startswith("2 connections")
        assert await world.reconciler.inspect(WEB) == {}, "what drains on purpose is no drift"
        world.carried.there["web"] = {8, 9, 10}  # made since: none of its business
        (note,) = (await world.reconciler.settled("web")).notes
        assert note.startswith("1 connection from before the change to rules")
        world.carried.there["web"] = {9, 10}
        status = await world.reconciler.settled("web")
        rules = held(world, "rules")
        assert held(world, "old") is None and status.notes == () and rules is not None
        assert not rules.marks and not rules.preserve and held(world, "routing") == rules
        assert world.namespaces.carried["web"] in ((8,), ()), world.namespaces.carried
        assert await world.reconciler.inspect(WEB) == {}
        assert world.reconciler.repairs("web") == [], "nobody drifted"
        world.kernel.held["old", world.target("web")] = "somebody's"
        await world.reconciler.settled("web")
        assert world.kernel.held["old", world.target("web")] == "somebody's", "it is not ours any more"

    play(script, by_socket=True)


@pytest.mark.parametrize("by_socket", [None, True, False])
def test_the_old_way_goes_a_grace_period_after_the_new_one_came_and_many_pods_share_it(
    by_socket: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet may have passed the new way's hook before the rules came, and not met the old way's yet."""
    monkeypatch.setattr(pod_state, "SOON", 3600.0)  # a second pass of the first pods has a grace period of its own
    pods = [replace(pod(f"p{number}"), source="static") for number in range(20)]

    async def script(world: World) -> None:
        for one in pods:
            captured(world, one=one)
            world.table.seen(one)
        left, all_came = {one.uid for one in pods}, threading.Event()

        def coming(target: Target) -> None:
            left.discard(target.uid)
            if not left:
                all_came.set()

        def wait() -> None:
            assert all_came.wait(20)

        world.rules.before_apply, world.during_grace = coming, wait
        await asyncio.gather(*(world.reconciler.settled(one.uid) for one in pods))
        log = world.kernel.log
        for one in pods:
            (gone,) = (at for at, line in enumerate(log) if line in (f"old clear {one.uid}", f"old set {one.uid}"))
            assert "grace" in log[log.index(f"rules set {one.uid}") : gone], log
        assert log.count("grace") <= 2, "all that came while the first was under way share the second"

    play(script, by_socket=by_socket)


def test_what_waits_for_a_grace_period_that_fails_is_tried_again() -> None:
    async def script(world: World) -> None:
        captured(world)

        def fail() -> None:
            world.during_grace = lambda: None
            raise KernelError("wait", 1, "not now")

        world.during_grace = fail
        (status,) = await world.settle(WEB)
        assert status.state is State.FAILED and "not now" in status.error
        assert held(world, "rules") is not None and held(world, "old") == BEFORE, "both ways capture meanwhile"
        while held(world, "old") is not None:
            await world.reconciler.progressed()

    play(script)


def test_a_pod_without_an_old_way_waits_for_no_grace_period() -> None:
    async def script(world: World) -> None:
        await world.settle(WEB)
        assert "grace" not in world.kernel.log

    play(script)


def test_without_connections_it_drains_for_a_moment_by_itself() -> None:
    """An answer to a query may be under way."""

    async def script(world: World) -> None:
        captured(world)
        await world.settle(WEB)
        old = held(world, "old")
        assert old is not None and old.draining
        while held(world, "old") is not None:
            await world.reconciler.progressed()

    play(script, by_socket=True)


def test_what_is_made_while_the_change_is_made_counts() -> None:
    async def script(world: World) -> None:
        captured(world, 7)

        def late(_: Target) -> None:
            world.carried.there["web"] |= {8}

        world.old.before_apply = late
        await world.settle(WEB)
        assert world.namespaces.carried["web"] == (7, 8)

    play(script, by_socket=True)


def test_the_list_is_on_disk_before_anything_is_changed() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        seen: list[tuple[int, ...]] = []
        world.routing.before_apply = lambda target: seen.append(world.namespaces.carried["web"])
        await world.settle(WEB)
        assert seen == [(7,)]

    play(script, by_socket=True)
    play(script, by_socket=False)


@pytest.mark.parametrize("by_socket", [True, False])
def test_a_restart_goes_on_with_what_was_listed_and_lists_nothing_new(by_socket: bool) -> None:
    async def script(world: World) -> None:
        captured(world, 7, 8)
        await world.settle(WEB)
        world.carried.there["web"] = {8, 9}
        made = restarted(world)
        loop = asyncio.create_task(made.run())
        status = await made.settled("web")
        assert status.notes[0].startswith("1 connection "), status.notes
        world.carried.there["web"] = {9}
        assert (await made.settled("web")).notes == ()
        rules = held(world, "rules")
        assert held(world, "old") is None and rules is not None and not rules.preserve
        loop.cancel()

    play(script, by_socket=by_socket)


def test_rules_preserve_while_connections_last_that_they_have_not_seen() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        (status,) = await world.settle(WEB)
        assert world.kernel.log == ["routing set web", "rules set web", "grace", "old clear web", "publish web"]
        rules = held(world, "rules")
        assert rules is not None and rules.preserve and rules.marks and status.outside == 0
        assert "carried on as before" in status.notes[0] and held(world, "old") is None
        assert await world.reconciler.inspect(WEB) == {}
        world.carried.there["web"] = {9}
        await world.reconciler.settled("web")
        rules = held(world, "rules")
        assert rules is not None and not rules.preserve and world.reconciler.repairs("web") == []

    play(script, by_socket=False)


@pytest.mark.parametrize("by_socket", [True, False, None])
def test_a_pod_that_the_old_layer_does_not_capture_changes_nothing(by_socket: bool | None) -> None:
    async def script(world: World) -> None:
        world.carried.there["web"] = {7}
        (status,) = await world.settle(WEB)
        rules = held(world, "rules")
        assert rules is not None and not rules.preserve and rules.marks is not by_socket
        assert status.notes == () and world.carried.known.get("web", set()) == set()

    play(script, by_socket=by_socket)


def test_two_layers_that_translate_follow_each_other_at_once() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        await world.settle(WEB)
        rules = held(world, "rules")
        assert held(world, "old") is None and rules is not None and not rules.preserve

    play(script)


def test_a_change_that_fails_in_between_is_made_again() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        world.old.failures = [KernelError("apply", 1, "no")]
        (status,) = await world.settle(WEB)
        assert status.state is State.FAILED and held(world, "old") == BEFORE
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()
        old = held(world, "old")
        assert old is not None and old.draining and world.namespaces.carried["web"] == (7,)

    play(script, by_socket=True)


def test_a_pod_that_forwards_keeps_its_marks() -> None:
    async def script(world: World) -> None:
        world.namespaces.resolve(WEB).forwards = True
        await world.settle(WEB)
        rules = held(world, "rules")
        assert rules is not None and rules.marks and held(world, "routing") == rules

    play(script, by_socket=True)


def test_a_pod_is_only_enabled_once_ztunnels_sockets_were_looked_for() -> None:
    async def script(world: World) -> None:
        world.publisher.hold = asyncio.Event()
        world.table.seen(pod())
        world.reconciler.wake("web")
        while "rules set web" not in world.kernel.log:  # noqa: ASYNC110 - kernel work alone tells no event
            await asyncio.sleep(0)
        world.kernel.damage("rules", world.target("web"))  # stands for sockets that are not known yet
        world.publisher.hold.set()
        while world.reconciler.status("web").state is not State.ENABLED:
            await world.reconciler.progressed()
        assert isinstance(world.held("rules", "web"), Redirect)
        assert world.journal.causes[-1] == "" and world.reconciler.repairs("web") == [], "it is no repair"
        reads = world.rules.reads
        await world.reconciler.settled("web")
        assert world.rules.reads == reads + 1, "nor is it looked at twice from then on"

    play(script, by_socket=True)


def test_a_new_ztunnel_has_the_pod_once_its_sockets_were_looked_for() -> None:
    async def script(world: World) -> None:
        await world.settle(WEB)
        reads = world.rules.reads
        await world.reconciler.acknowledged("web")
        assert world.rules.reads > reads and world.reconciler.status("web").state is State.ENABLED

    play(script, by_socket=True)


@pytest.mark.parametrize("by_socket", [True, False])
def test_what_outlives_a_pod_goes_with_it_and_what_does_not_is_left_to_the_kernel(by_socket: bool) -> None:
    async def script(world: World) -> None:
        await world.settle(WEB)
        target = world.target("web")
        world.kernel.held["old", target] = BEFORE
        world.table.gone("web")
        await world.reconciler.forget("web")
        lasting, other = ("rules", "old") if by_socket else ("old", "rules")
        assert (lasting, target) not in world.kernel.held and (other, target) in world.kernel.held
        assert world.kernel.log[-3:] == ["withdraw web", f"{lasting} clear web", "release web"]

    play(script, by_socket=by_socket)


def test_a_pod_that_cannot_be_cleaned_is_released_all_the_same_and_swept() -> None:
    async def script(world: World) -> None:
        await world.settle(WEB)
        target = world.target("web")
        world.rules.failures = [KernelError("apply", 1, "no")]
        world.table.gone("web")
        await world.reconciler.forget("web")
        assert ("rules", target) in world.kernel.held and world.kernel.log[-1] == "release web"
        async with asyncio.timeout(20):
            while ("rules", target) in world.kernel.held:  # noqa: ASYNC110 - a sweep tells no event
                await asyncio.sleep(0.001)

    play(script, by_socket=True, verify_seconds=0.01)


@pytest.mark.parametrize("by_socket", [True, False])
def test_what_ended_pods_left_is_swept_and_nothing_of_a_pod_that_lives(by_socket: bool) -> None:
    async def script(world: World) -> None:
        layer = "rules" if by_socket else "old"
        gone, unknown = Target("gone"), Target("unknown")
        world.namespaces.alive.add(unknown.cookie)
        for target in (gone, unknown):
            world.kernel.held[layer, target] = BEFORE
        failing = replace(pod("bad"), source="static")
        bad = world.namespaces.resolve(failing)
        world.kernel.held[layer, bad] = BEFORE
        world.namespaces.failures |= {"bad": KernelError("enter", 1, "no")}
        await world.settle(WEB, failing)
        world.namespaces.failures |= {"bad": KernelError("enter", 1, "no")}
        async with asyncio.timeout(20):
            while (layer, gone) in world.kernel.held:  # noqa: ASYNC110 - a sweep tells no event
                await asyncio.sleep(0.001)
        assert (layer, unknown) in world.kernel.held and f"{layer} clear web" not in world.kernel.log
        assert f"{layer} clear unknown" not in world.kernel.log
        assert by_socket is False or (layer, bad) in world.kernel.held

    play(script, by_socket=by_socket, verify_seconds=0.01)


def test_the_old_way_stays_in_force_until_ztunnels_sockets_are_known() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        world.rules.ready = lambda: "publish web" in world.kernel.log
        (status,) = await world.settle(WEB)
        assert status.state is State.ENABLED
        before, after = world.kernel.log[: world.kernel.log.index("publish web")], world.kernel.log
        assert "rules set web" not in before and held(world, "old") is not None, "nothing was given up before"
        assert after.index("rules set web") > after.index("publish web"), "and then it was taken over"
        await world.reconciler.settled("web")
        old = held(world, "old")
        assert old is not None and old.draining

    play(script, by_socket=True)


def test_while_no_ztunnel_is_there_the_old_way_stays_as_it_was() -> None:
    async def script(world: World) -> None:
        captured(world, 7)
        world.rules.ready, world.publisher.connected = lambda: False, False
        (status,) = await world.settle(WEB)
        assert status.state is State.PENDING
        old = held(world, "old")
        assert old is not None and not old.draining and held(world, "rules") is None
        assert await world.reconciler.inspect(WEB) == {}, "what is postponed is no drift"

    play(script, by_socket=True)
