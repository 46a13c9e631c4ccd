# SPDX-License-Identifier: Apache-2.0
"""The loop as step scripts over a kernel that keeps state and refuses plans made from another one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from support.world import World, play, pod

from agent.core.errors import ForeignNetnsError, KernelError
from agent.core.model.status import State


def test_a_new_pod_is_captured_in_order_and_then_left_alone() -> None:
    async def script(world: World) -> None:
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED and status.backend == "rules" and status.error == ""
        assert world.kernel.log == ["routing set web", "rules set web", "publish web"]
        await world.reconciler.settled("web")
        assert len(world.kernel.log) == 3, "nothing to do, nothing done"
        assert world.namespaces.captured == {"web"} and world.watcher.watched == {"web"}

    play(script)


def test_drift_is_repaired_and_the_culprit_named() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.damage("rules", world.target("web"))
        world.reconciler.wake("web", "nft[42]")
        world.reconciler.wake("web", "somebody-later[43]")
        status = await world.reconciler.settled("web")
        (repair,) = world.reconciler.repairs("web")
        assert (repair.layer, repair.cause) == ("rules", "nft[42]"), "the first is the culprit"
        assert status.repairs == 1 and world.held("rules", "web") == world.held("routing", "web")
        await world.reconciler.settled("web")
        assert len(world.reconciler.repairs("web")) == 1

    play(script)


def test_one_pods_failure_stops_no_other_and_is_tried_again() -> None:
    async def script(world: World) -> None:
        world.namespaces.failures["bad"] = ForeignNetnsError("pod shop/bad: holds none of its addresses")
        bad, good = await world.settle(pod("bad"), pod("good"))
        assert bad.state is State.FAILED and "none of its addresses" in bad.error and bad.retry is not None
        assert good.state is State.ENABLED
        while world.reconciler.status("bad").state is not State.ENABLED:
            await world.reconciler.progressed()  # by the backoff alone: nobody wakes it

    play(script)


def test_a_defect_met_by_one_pod_is_its_failure_and_the_loop_goes_on() -> None:
    async def script(world: World) -> None:
        world.namespaces.failures["bad"] = ZeroDivisionError("a defect")  # type: ignore[assignment]
        bad, good = await world.settle(pod("bad"), pod("good"))
        assert (bad.state, good.state) == (State.FAILED, State.ENABLED)

    play(script)


def test_without_ztunnel_the_rules_are_in_and_the_pod_is_pending() -> None:
    async def script(world: World) -> None:
        world.publisher.connected = False
        (status,) = await world.settle(pod())
        assert status.state is State.PENDING and "no ztunnel" in status.error
        assert world.held("rules", "web") is not None
        world.publisher.connected = True
        assert (await world.reconciler.settled("web")).state is State.ENABLED

    play(script)


def test_unenrolling_removes_the_rules_before_ztunnel_is_told() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.log.clear()
        await world.let_go(pod(enrolled=False))
        assert world.reconciler.status("web").state is State.EXCLUDED
        assert world.kernel.log == [
            "rules set web", "routing set web", "withdraw web", "reset web", "rules clear web", "routing clear web",
        ], "they drain first"  # fmt: skip
        assert world.kernel.held == {} and world.watcher.watched == set() and world.namespaces.captured == set()
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED, "and back"

    play(script)


def test_an_excluded_pod_that_was_never_ours_is_not_touched() -> None:
    async def script(world: World) -> None:
        target = world.namespaces.targets.setdefault("web", world.namespaces.resolve(pod()))
        world.kernel.held["rules", target] = "another agent's"
        (status,) = await world.settle(pod(enrolled=False))
        assert status.state is State.EXCLUDED and world.kernel.log == []
        assert world.kernel.held == {("rules", target): "another agent's"}

    play(script)


def test_a_pod_that_asks_for_too_much_is_refused_and_stays_captured_as_it_was() -> None:
    async def script(world: World) -> None:
        await world.settle(pod("old"))
        many = {**pod().annotations, "istio.io/reroute-virtual-interfaces": ",".join(f"v{n}" for n in range(300))}
        world.kernel.log.clear()
        old, new = await world.settle(replace(pod("old"), annotations=many), replace(pod("new"), annotations=many))
        assert new.state is State.FAILED and "more than 256 interfaces" in new.error
        assert new.error.endswith(": the pod is not captured until its annotations change")
        assert old.state is State.ENABLED and "more than 256 interfaces" in old.notes[0]
        asked = world.held("rules", "old")
        world.kernel.held["rules", world.namespaces.resolve(pod("old"))] = "drift"
        await world.reconciler.settled("old")
        assert world.held("rules", "old") == asked, "drift is repaired all the same"
        assert await world.reconciler.inspect(replace(pod("old"), annotations=many)) == {}
        restored = replace(pod("restored"), annotations=many)
        world.namespaces.remember(restored, captured=True)  # by an earlier agent
        (status,) = await world.settle(restored)
        assert status.error.endswith(": its rules stay as they are, and are not repaired until its annotations change")
        assert all("restored" not in line for line in world.kernel.log)

    play(script)


def test_a_retired_backend_is_cleared_once_after_the_new_rules_are_in() -> None:
    async def script(world: World) -> None:
        target = world.namespaces.resolve(pod())
        world.kernel.held["old", target] = "of the former choice"
        await world.settle(pod())
        assert world.kernel.log == ["routing set web", "rules set web", "grace", "old clear web", "publish web"]
        world.kernel.held["old", target] = "somebody's"
        await world.reconciler.settled("web")
        assert world.kernel.held["old", target] == "somebody's", "only once: from then on it is not ours"

    play(script)


def test_a_change_in_between_is_looked_at_again() -> None:
    async def script(world: World) -> None:
        raced = iter([True])

        def race(_: object) -> None:
            world.kernel.generation += next(raced, False)

        world.rules.before_apply = race
        (status,) = await world.settle(pod())
        assert status.state is State.ENABLED and world.kernel.log.count("rules set web") == 1

    play(script)


def test_rules_that_do_not_stay_are_a_failure_that_says_so() -> None:
    async def script(world: World) -> None:
        world.rules.deaf = True
        (status,) = await world.settle(pod())
        assert status.state is State.FAILED and "changed again after being applied" in status.error
        world.rules.deaf = False
        assert (await world.reconciler.settled("web")).state is State.ENABLED
        assert world.journal.fights == [], "a pod that was never captured has no rules that somebody could revert"

    play(script)


def test_rules_that_another_process_reverts_within_each_pass_are_a_conflict() -> None:
    """No repair succeeds then, so that none was counted, and the conflict was not reported."""

    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.damage("rules", world.target("web"))
        world.rules.deaf = True
        while not world.journal.fights:
            world.reconciler.wake("web", "nft[42]")
            assert (await world.reconciler.settled("web")).state is State.FAILED
        assert world.reconciler.repairs("web") == []
        world.rules.deaf = False
        assert (await world.reconciler.settled("web")).state is State.ENABLED

    play(script)


def test_a_refused_plan_fails_with_the_kernels_words_and_the_script() -> None:
    async def script(world: World) -> None:
        error = KernelError("nf_tables transaction", 1, "Operation not permitted")
        world.rules.failures = [error]
        (status,) = await world.settle(pod())
        assert status.state is State.FAILED and "Operation not permitted" in status.error
        assert error.__notes__ == ["rules set"]

    play(script)


def test_a_pod_whose_namespace_is_gone_is_forgotten() -> None:
    async def script(world: World) -> None:
        await world.settle(pod(), pod("other"))
        world.namespaces.gone.add("web")
        await world.reconciler.settled("web")
        assert world.table.get("web") is None and len(world.table) == 1
        assert world.kernel.log[-2:] == ["withdraw web", "release web"]
        assert world.reconciler.status("other").state is State.ENABLED

    play(script)


def test_forgetting_waits_for_the_pass_that_runs_and_leaves_nothing() -> None:
    async def script(world: World) -> None:
        world.publisher.hold = asyncio.Event()
        world.table.seen(pod())
        world.reconciler.wake("web")
        while "rules set web" not in world.kernel.log:  # noqa: ASYNC110 - kernel work alone tells no event
            await asyncio.sleep(0)
        world.table.gone("web")
        forgetting = asyncio.create_task(world.reconciler.forget("web"))
        await asyncio.sleep(0)
        assert not forgetting.done()
        world.publisher.hold.set()
        await forgetting
        assert world.kernel.log[-2:] == ["withdraw web", "release web"]
        assert world.watcher.watched == set() and world.reconciler.status("web").state is State.WAITING

    play(script)


def test_the_same_pod_in_another_namespace_starts_anew() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        before = world.target("web")
        world.table.gone("web")
        await world.reconciler.forget("web")
        (status,) = await world.settle(pod(netns_path="/run/netns/again"))
        assert status.state is State.ENABLED and world.target("web") is not before
        assert world.reconciler.repairs("web") == [], "a new namespace without rules is no drift"

    play(script)


def test_settled_is_of_a_pass_that_began_after_the_call() -> None:
    async def script(world: World) -> None:
        world.publisher.hold = asyncio.Event()
        world.table.seen(pod())
        first = asyncio.create_task(world.reconciler.settled("web"))
        while "rules set web" not in world.kernel.log:  # noqa: ASYNC110 - kernel work alone tells no event
            await asyncio.sleep(0)
        world.table.seen(replace(pod(), annotations={}))
        second = asyncio.create_task(world.reconciler.settled("web"))
        await asyncio.sleep(0)
        world.publisher.hold.set()
        assert (await first).state is State.ENABLED
        assert (await second).state is State.EXCLUDED

    play(script)


def test_inspect_tells_and_changes_nothing() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        assert await world.reconciler.inspect(pod()) == {}
        world.kernel.damage("rules", world.target("web"))
        log = list(world.kernel.log)
        found = await world.reconciler.inspect(pod())
        assert found == {"rules": (("it holds damaged",), "rules set")}
        assert world.kernel.log == log and world.held("rules", "web") == "damaged"

    play(script)


def test_many_pods() -> None:
    async def script(world: World) -> None:
        pods = [pod(f"p{number}") for number in range(300)]
        for one in pods:
            world.table.seen(one)
        states = await asyncio.gather(*(world.reconciler.settled(one.uid) for one in pods))
        assert {status.state for status in states} == {State.ENABLED} and world.reconciler.synced

    play(script)


def test_verification_by_the_timer_repairs_what_nobody_told_of() -> None:
    async def script(world: World) -> None:
        await world.settle(pod())
        world.kernel.damage("rules", world.target("web"))
        while world.held("rules", "web") == "damaged":
            await world.reconciler.progressed()
        (repair,) = world.reconciler.repairs("web")
        assert repair.cause == "unknown"

    play(script, verify_seconds=0.01)
