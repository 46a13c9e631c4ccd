# SPDX-License-Identifier: Apache-2.0
"""Enrolment: older connections, the node's probes, the canary's verdict, and somebody who fights back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.fakekernel import Target
from support.world import Accounting, World, play, pod

from agent.core.model.plan import Foreign
from agent.core.model.pods import Pod
from agent.core.model.port_listeners import PortListeners
from agent.core.model.redirect import Redirect
from agent.core.model.status import State
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.policy.phases import LIMITS, Phase
from agent.kernel.pod_netns import NetnsFacts

FAILED = ProbeResult(ProbeVerdict.FAILED, ("10.0.0.2", 80), "No route to host")


def running(name: str = "web") -> Pod:
    """A pod that is not just being made: a static file named it."""
    return replace(pod(name), source="static")


def held(world: World, uid: str = "web") -> Redirect:
    found = world.held("rules", uid)
    assert isinstance(found, Redirect)
    return found


async def until(world: World, state: State, uid: str = "web") -> None:
    while world.reconciler.status(uid).state is not state:
        await world.reconciler.progressed()


def test_p55_rules_are_lenient_while_older_connections_live_and_strict_afterwards() -> None:
    async def script(world: World) -> None:
        world.outside.there["web"] = {7, 8}
        (status,) = await world.settle(running())
        assert status.state is State.ENABLED and status.outside == 2 and held(world).preserve
        assert "10.0.0.2:5000 -> 10.0.0.9:80" in status.notes[0]
        assert world.namespaces.noted["web"] == (7, 8), "a later process finds them again"
        assert await world.reconciler.inspect(running()) == {}, "what is lenient on purpose is no drift"
        world.outside.there["web"] = {8}
        assert (await world.reconciler.settled("web")).outside == 1
        world.outside.there["web"] = {99}  # a new one is captured, not outside
        status = await world.reconciler.settled("web")
        assert (status.outside, status.notes, held(world).preserve) == (0, (), False)
        assert world.journal.causes[-1] == "", "nobody drifted"

    play(script)


def test_older_connections_are_looked_at_again_without_being_asked() -> None:
    async def script(world: World) -> None:
        world.outside.there["web"] = {7}
        await world.settle(running())
        world.outside.there["web"] = set()
        while held(world).preserve:
            await world.reconciler.progressed()

    play(script)


def test_connections_are_not_preserved_when_the_setting_says_so_or_the_pod_is_just_being_made() -> None:
    async def script(world: World) -> None:
        world.outside.there["web"] = {7}
        preserves = world.reconciler.settings.preserve_connections
        (status,) = await world.settle(pod() if preserves else running())
        assert status.outside == 0 and not held(world).preserve
        assert world.kernel.log.count("rules set web") == 1

    play(script)
    play(script, preserve_connections=False)


def test_probes_are_exempt_before_the_rules_come_and_until_they_are_gone() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        log = world.kernel.log
        assert log.index("claim web") < log.index("rules set web")
        assert world.host.claims == {"web": ("10.0.0.2",)}
        await world.let_go(pod(enrolled=False))
        assert log.index("rules clear web") < log.index("unclaim web")

    play(script, exempt=True)


def test_an_address_that_a_pod_gave_itself_is_not_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the node's own connections to who really has it would get the probe address as their source."""
    held = NetnsFacts(ipv6=True, addresses=("10.0.0.2", "192.0.2.1"), loopback4=True, loopback6=True)
    monkeypatch.setattr(Target, "facts", lambda _: held)

    async def script(world: World) -> None:
        await world.settle(pod(addresses=("10.0.0.2",)))
        assert world.host.claims == {"web": ("10.0.0.2",)}

    play(script, exempt=True)


def test_p45_a_probe_that_fails_is_told_and_the_pod_stays_captured() -> None:
    async def script(world: World) -> None:
        world.canary.answer = FAILED
        await world.settle(pod())
        while not world.journal.findings:
            await world.reconciler.progressed()
        assert world.journal.findings == [FAILED]
        status = await world.reconciler.settled("web")
        assert status.state is State.ENABLED and "No route to host" in status.probe
        assert world.canary.probes == 1, "once"

    play(script, exempt=True)


def test_p45_a_probe_that_fails_rolls_the_enrolment_back_when_the_setting_says_so() -> None:
    async def script(world: World) -> None:
        world.canary.answer = FAILED
        await world.settle(pod())
        await until(world, State.FAILED)
        status = world.reconciler.status("web")
        assert "rolled back" in status.error and "No route to host" in status.error
        await world.reconciler.settled("web")
        assert world.held("rules", "web") is None and "web" not in world.publisher.published
        assert await world.reconciler.inspect(pod()) == {}
        assert (await world.reconciler.settled("web")).state is State.FAILED, "and stays so"
        world.canary.answer = ProbeResult(ProbeVerdict.OK, ("10.0.0.2", 80))
        changed = {**pod().annotations, "ambient.istio.io/dns-capture": "false"}
        (status,) = await world.settle(replace(pod(), annotations=changed))
        assert status.state is State.ENABLED, "another intent is another try"

    play(script, exempt=True, probe_canary="rollback")


def test_a_pod_that_listens_later_is_probed_then() -> None:
    async def script(world: World) -> None:
        world.canary.answer = ProbeResult(ProbeVerdict.NO_LISTENER)
        await world.settle(pod())
        world.canary.answer = ProbeResult(ProbeVerdict.OK, ("10.0.0.2", 80))
        while not world.journal.findings:
            await world.reconciler.progressed()  # by itself
        assert world.reconciler.status("web").probe.endswith(": ok")

    play(script, exempt=True)


def test_a_pod_that_ztunnel_takes_later_is_probed_then() -> None:
    async def script(world: World) -> None:
        world.publisher.connected = False
        (status,) = await world.settle(pod())
        assert status.state is State.PENDING and world.canary.probes == 0
        world.publisher.connected = True
        await world.reconciler.settled("web")
        while not world.journal.findings:
            await world.reconciler.progressed()
        await world.reconciler.settled("web")
        assert world.canary.probes == 1, "once"

    play(script, exempt=True)


def test_who_keeps_undoing_repairs_is_named_and_no_longer_answered_at_once() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        for _ in range(6):
            world.kernel.damage("rules", world.target("web"))
            world.reconciler.wake("web", "nft[42]")
            await world.reconciler.progressed()
            while len(world.reconciler.repairs("web")) == 0:
                await world.reconciler.progressed()
        assert world.journal.fights == ["nft[42]"]
        assert world.reconciler.status("web").error.startswith("rule conflict: another process reverts repairs")
        world.kernel.damage("rules", world.target("web"))
        world.reconciler.wake("web", "nft[42]")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not isinstance(world.held("rules", "web"), Redirect), "left alone for a while"
        while not isinstance(world.held("rules", "web"), Redirect):
            await world.reconciler.progressed()  # but not for ever

    play(script)


def test_a_change_that_is_told_while_a_pass_runs_keeps_its_name() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.damage("rules", world.target("web"))

        def again(_: object) -> None:
            world.rules.before_apply = lambda target: None
            loop.call_soon_threadsafe(late)

        def late() -> None:
            world.reconciler.wake("web", "iptables[43]")

        loop = asyncio.get_running_loop()
        world.rules.before_apply = again
        world.reconciler.wake("web", "nft[42]")
        await world.reconciler.progressed()
        world.kernel.damage("rules", world.target("web"))
        await world.reconciler.settled("web")
        assert [repair.cause for repair in world.reconciler.repairs("web")] == ["nft[42]", "iptables[43]"]

    play(script)


def test_a_pod_that_changes_rules_of_its_own_without_pause_does_not_keep_us_busy() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        passes = 0
        for _ in range(2000):
            world.reconciler.wake("web", "pod[7]")
            for _ in range(3):
                await asyncio.sleep(0)
        passes = world.rules.reads
        assert passes < 60, passes

    play(script)


def test_in_a_pod_that_runs_ztunnel_is_there_before_the_rules() -> None:
    async def script(world: World) -> None:
        (status,) = await world.settle(running())
        assert status.state is State.ENABLED
        log = world.kernel.log
        assert log.index("publish web") < log.index("routing set web") < log.index("rules set web")

    play(script)


def test_a_pod_that_runs_waits_for_a_ztunnel_without_rules_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(world: World) -> None:
        world.publisher.connected = False
        (status,) = await world.settle(running())
        assert status.state is State.WAITING and "no ztunnel" in status.error
        assert world.kernel.log == [] and world.namespaces.captured == set()
        world.publisher.connected = True
        await world.reconciler.acknowledged("web")
        await until(world, State.ENABLED)
        world.publisher.connected = False
        monkeypatch.setitem(LIMITS, Phase.WAITING, 0.0)
        (status,) = await world.settle(running("db"))
        assert status.state is State.PENDING and held(world, "db"), "captured, and refused"

    play(script)


def test_a_pod_that_waits_for_a_ztunnel_and_is_not_to_be_captured_any_more() -> None:
    async def script(world: World) -> None:
        world.publisher.connected = False
        await world.settle(running())
        (status,) = await world.settle(replace(running(), annotations={}))
        assert (status.state, status.leaving) == (State.EXCLUDED, False) and world.kernel.log == []

    play(script)


def test_what_ztunnel_carries_ends_by_itself_before_the_last_rules_go() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.proxied.carries.add("web")
        world.kernel.log.clear()
        (status,) = await world.settle(pod(enrolled=False))
        assert (status.state, status.leaving) == (State.EXCLUDED, True)
        await world.reconciler.settled("web")
        assert held(world).draining and "web" in world.publisher.published
        assert await world.reconciler.inspect(pod(enrolled=False)) == {}, "rules that drain are no drift"
        world.proxied.carries.clear()
        while world.reconciler.status("web").leaving:
            await world.reconciler.progressed()  # by itself
        assert world.held("rules", "web") is None and "web" not in world.publisher.published

    play(script)


def test_what_ztunnel_still_carries_in_the_end_is_reset_while_rules_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.proxied.carries.add("web")
        world.kernel.log.clear()
        monkeypatch.setitem(LIMITS, Phase.LEAVING, 0.0)
        await world.let_go(pod(enrolled=False))
        log = world.kernel.log
        assert log.index("withdraw web") < log.index("reset web") < log.index("rules clear web")

    play(script)


def test_a_pod_that_comes_back_while_it_leaves_is_captured_as_one_that_runs() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        await world.settle(pod(enrolled=False))
        world.outside.there["web"] = {7}  # made meanwhile
        (status,) = await world.settle(pod())
        assert (status.state, status.leaving, status.outside) == (State.ENABLED, False, 1)
        assert held(world).preserve and not held(world).draining

    play(script)


def test_the_exemption_of_hbone_follows_ztunnels_listener() -> None:
    async def script(world: World) -> None:
        world.listening.found = PortListeners(hbone=False)
        await world.settle(pod())
        assert not held(world).hbone
        world.listening.found = PortListeners()  # it has just begun to listen
        assert (await world.reconciler.settled("web")).state is State.ENABLED
        assert held(world).hbone and world.journal.causes[-1] == "", "that is no drift"
        assert await world.reconciler.inspect(pod()) == {}
        world.listening.found = PortListeners(foreign=("nginx[7] listens",), hbone=False)  # on 15008
        assert "rules" in await world.reconciler.inspect(pod())
        assert (await world.reconciler.settled("web")).state is State.ENABLED
        assert not held(world).hbone
        assert await world.reconciler.inspect(pod()) == {"ztunnel": (("nginx[7] listens",), "")}

    play(script, listens=True)


def test_a_pod_that_listens_on_ztunnels_ports_fails_and_its_connections_are_dropped() -> None:
    async def script(world: World) -> None:
        taken = world.listening.found = PortListeners(foreign=("nginx[7] listens",), taken=("nginx[7] listens",))
        world.publisher.connected = False  # as good as refusing the pod, where it cannot listen
        (status,) = await world.settle(running())
        assert (status.state, held(world).blocked) == (State.FAILED, True)
        assert status.error == "nginx[7] listens; new connections are refused until it ends or uses another port"
        world.listening.found, world.publisher.connected = PortListeners(), True
        await until(world, State.ENABLED)
        assert not held(world).blocked
        world.listening.found = taken
        assert (await world.reconciler.settled("web")).state is State.FAILED
        assert (await world.reconciler.settled("web")).state is State.FAILED and held(world).blocked
        world.listening.found = PortListeners()
        await until(world, State.ENABLED)
        assert not held(world).blocked

    play(script, listens=True)


def test_foreign_rules_before_ours_are_said_once_while_they_are_there() -> None:
    async def script(world: World) -> None:
        line = Foreign("chain inet vpn out, priority -160: 1 rule with mark")
        world.routing.remarks, world.rules.remarks = (line,), (line, "something else")
        world.old.remarks = (Foreign("chain ip nat OUTPUT before our jump"),)  # of a layer that holds no jump
        (status,) = await world.settle(pod())
        assert status.foreign == (line,) and status.notes == (line, "something else")
        assert (await world.reconciler.settled("web")).foreign == (line,)
        assert (await world.reconciler.inspect(pod(), foreign=True)) == {"foreign": ((line,), "")}
        world.routing.remarks = world.rules.remarks = ()
        assert (await world.reconciler.settled("web")).foreign == ()

    play(script)


def test_ztunnels_own_connections_that_come_back_count_as_foreign_rules() -> None:
    accounting = Accounting()
    accounting.open.set()

    async def script(world: World) -> None:
        await world.settle(pod())
        accounting.remarks = (Foreign("they come back"),)
        assert (await world.reconciler.settled("web")).foreign == accounting.remarks
        assert (await world.reconciler.inspect(pod(), foreign=True)) == {"foreign": (accounting.remarks, "")}
        accounting.remarks = ()
        assert (await world.reconciler.settled("web")).foreign == ()

    play(script, accounting=accounting)


def test_a_pod_that_leaves_while_its_sandbox_ends_is_soon_done() -> None:
    """Whoever waits for the last of its rules does not wait for a sandbox that stays so."""

    async def script(world: World) -> None:
        await world.settle(pod())
        (status,) = await world.settle(pod(enrolled=False))
        assert status.leaving
        target = world.target("web")
        target.up = target.occupied = False
        status = await world.reconciler.settled("web")
        assert (status.state, status.leaving) == (State.EXCLUDED, False)

    play(script)
