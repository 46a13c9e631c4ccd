# SPDX-License-Identifier: Apache-2.0
"""The annotation follows the state, whatever the API server does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from agent.core import names
from agent.core.errors import KubeError
from agent.core.model.pods import KubePod, PodTable
from agent.core.model.status import State
from agent.sources.kube.annotating import Annotator

KUBE = KubePod("u1", "shop", "web", api_uid="a1", annotations={"own": "1"}, running=True)


class Api:
    """Keeps annotations as the API server does; `failures` are raised first."""

    def __init__(self, table: PodTable) -> None:
        self.table, self.failures, self.sent = table, list[KubeError](), list[tuple[str, str, Any, str]]()
        self.changed, self.hold, self.waiting = asyncio.Event(), asyncio.Event(), 0
        self.hold.set()

    async def send(self, method: str, path: str, body: Any, content_type: str = "") -> Mapping[str, Any]:
        self.waiting += 1
        await asyncio.sleep(0)
        await self.hold.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append((method, path, body, content_type))
        self.changed.set()
        return {}

    def values(self) -> list[str | None]:
        return [body["metadata"]["annotations"][names.REDIRECTION] for _, _, body, _ in self.sent]


class World:
    """`hold` 0: what is no longer true is taken back at once."""

    def __init__(self, hold: float = 0.0) -> None:
        self.table, self.state, self.captured = PodTable(), State.WAITING, True
        self.api, self.known, self.other, self.fights = Api(self.table), True, "", list[str]()
        self.annotator = Annotator(
            client=self.api,
            table=self.table,
            state=lambda _: self.state,
            captured=lambda _: self.captured,
            period=1000.0,
            random=lambda: 0.5,
            known=lambda: self.known,
            others=lambda: self.other,
            fought=lambda uid, words: self.fights.append(words),
            hold=hold,
        )

    async def sent(self, count: int) -> None:
        while len(self.api.sent) < count:
            self.api.changed.clear()
            await self.api.changed.wait()

    def be(self, state: State) -> None:
        self.state = state
        self.annotator.look("u1")


def during(world: World, play: Any) -> None:
    async def run() -> None:
        task = asyncio.create_task(world.annotator.run())
        try:
            async with asyncio.timeout(10):
                await play()
                for _ in range(20):  # whatever else would be sent, threads asked
                    await asyncio.sleep(0.001)
        finally:
            task.cancel()

    asyncio.run(run())


def test_each_state_is_written_once() -> None:
    world = World()
    world.table.know(KUBE)

    async def play() -> None:
        for number, state in enumerate((State.PENDING, State.ENABLED, State.EXCLUDED), 1):
            world.be(state)
            await world.sent(number)
            world.be(state)
        world.be(State.WAITING)

    during(world, play)
    assert world.api.values() == ["pending", "enabled", None]
    method, path, body, kind = world.api.sent[0]
    assert (method, path) == ("PATCH", "/api/v1/namespaces/shop/pods/web/status")
    assert kind == "application/merge-patch+json"
    assert body == {"metadata": {"uid": "a1", "annotations": {names.REDIRECTION: "pending"}}}


def test_what_the_api_has_already_is_not_written() -> None:
    world = World()
    world.table.know(replace(KUBE, annotations={names.REDIRECTION: "enabled"}))

    async def play() -> None:
        world.be(State.ENABLED)
        await asyncio.sleep(0)
        world.be(State.EXCLUDED)
        await world.sent(1)

    during(world, play)
    assert world.api.values() == [None]


def test_somebody_who_removes_it_is_answered() -> None:
    world = World()
    world.table.know(KUBE)

    async def play() -> None:
        world.be(State.ENABLED)
        await world.sent(1)
        world.table.know(KUBE)
        world.annotator.look("u1")
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["enabled", "enabled"]


def test_a_stalled_ztunnel_takes_nothing_back() -> None:
    world = World()
    world.table.know(KUBE)

    async def play() -> None:
        world.be(State.STALLED)
        await world.sent(1)
        world.be(State.ENABLED)
        world.be(State.STALLED)
        world.be(State.EXCLUDED)
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["enabled", None]


def test_a_failed_pod_is_pending_while_its_rules_are_there_and_else_nothing() -> None:
    world = World()
    world.table.know(KUBE)

    async def play() -> None:
        world.be(State.FAILED)
        await world.sent(1)
        world.captured = False
        world.be(State.FAILED)
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["pending", None]


@pytest.mark.parametrize("status", [500, 429, 403, 0])
def test_it_is_tried_again(status: int) -> None:
    world = World()
    world.table.know(KUBE)
    world.api.failures = [KubeError("no", status)]

    async def play() -> None:
        world.be(State.ENABLED)
        await world.sent(1)

    during(world, play)
    assert world.api.values() == ["enabled"]


@pytest.mark.parametrize("status", [404, 409])
def test_a_pod_that_is_gone_or_another_by_now_is_left_alone(status: int) -> None:
    world = World()
    world.table.know(KUBE)
    world.api.failures = [KubeError("no", status)]

    async def play() -> None:
        world.be(State.ENABLED)
        while world.api.failures:  # noqa: ASYNC110
            await asyncio.sleep(0)

    during(world, play)
    assert world.api.sent == []


def test_a_pod_that_kubernetes_does_not_know_is_not_looked_at() -> None:
    world = World()

    async def play() -> None:
        world.be(State.ENABLED)

    during(world, play)
    assert world.api.sent == []


CAPTURED = replace(KUBE, annotations={names.REDIRECTION: "enabled"})


@pytest.mark.parametrize(("state", "captured"), [(State.PENDING, True), (State.FAILED, True), (State.FAILED, False)])
def test_enabled_outlasts_a_while_without_ztunnel_or_rules(state: State, captured: bool) -> None:
    world = World(hold=1000.0)
    world.table.know(CAPTURED)
    world.captured = captured

    async def play() -> None:
        world.be(state)
        await asyncio.sleep(0.01)
        world.be(State.ENABLED)

    during(world, play)
    assert world.api.sent == []


def test_it_is_taken_back_when_that_lasts_and_at_once_when_the_pod_is_not_captured_any_more() -> None:
    world = World(hold=0.05)
    world.table.know(CAPTURED)

    async def play() -> None:
        world.be(State.PENDING)
        await world.sent(1)
        world.table.know(CAPTURED)
        world.annotator._hold = 1000.0
        world.be(State.EXCLUDED)
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["pending", None]


def test_a_pod_that_was_enrolled_and_rolled_back_is_told_of_at_once() -> None:
    """Its canary failed: it has no rules any more, and peers must not go on with HBONE."""
    world = World(hold=1000.0)
    world.table.know(KUBE)

    async def play() -> None:
        world.be(State.ENABLED)
        await world.sent(1)
        world.captured = False
        world.be(State.FAILED)
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["enabled", None]


def test_a_pod_that_goes_while_it_is_written_and_forgotten_meanwhile_hurts_nobody() -> None:
    world = World()
    world.table.know(KUBE)
    world.table.know(replace(KUBE, uid="u2", api_uid="a2"))

    async def play() -> None:
        world.api.hold.clear()
        world.be(State.ENABLED)
        while not world.api.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)
        world.table.unknow("u1", keep=False)
        world.annotator.look("u2")  # what is remembered of u1 makes room
        world.api.hold.set()
        await world.sent(2)

    during(world, play)
    assert world.api.values() == ["enabled", "enabled"]


def test_nothing_is_written_before_a_ztunnel_came_and_pods_and_namespaces_are_known() -> None:
    world = World()
    world.table.know(CAPTURED)
    world.known = False

    async def play() -> None:
        for state in State:
            world.be(state)
            await asyncio.sleep(0.001)
        assert world.api.sent == []
        world.known = True
        world.be(State.EXCLUDED)
        await world.sent(1)

    during(world, play)
    assert world.api.values() == [None]


def test_while_another_agent_runs_its_annotation_is_left_and_that_is_told() -> None:
    world = World()
    world.table.know(CAPTURED)
    world.other = "/run/other.sock answers"

    async def play() -> None:
        world.be(State.EXCLUDED)
        while not world.annotator.error:  # noqa: ASYNC110 - a thread tells nobody
            await asyncio.sleep(0.001)
        assert world.api.sent == [] and world.other in world.annotator.error
        world.other = ""
        await world.sent(1)

    during(world, play)
    assert world.api.values() == [None] and world.annotator.error == ""


def test_a_fight_is_seen_told_once_and_given_up() -> None:
    world = World()
    world.table.know(KUBE)

    async def play() -> None:
        world.be(State.ENABLED)
        for count in range(1, 5):
            await world.sent(count)
            world.table.know(KUBE)  # somebody takes it away again
            world.annotator.look("u1")

    during(world, play)
    assert world.api.values() == ["enabled"] * 4
    assert len(world.fights) == 1 and "another program keeps setting" in world.fights[0]
    assert "shop/web" in world.annotator.error


def test_what_was_remembered_of_pods_that_are_gone_makes_room() -> None:
    world = World()

    async def play() -> None:
        world.state = State.ENABLED
        for number in range(3):
            world.table.know(replace(KUBE, uid=f"p{number}", api_uid=f"p{number}"))
            world.annotator.look(f"p{number}")
            await world.sent(number + 1)
            world.table.unknow(f"p{number}", keep=False)

    during(world, play)
    assert len(world.annotator._past) == 1


@pytest.mark.parametrize("state", [State.WAITING, State.FAILED, State.ENABLED])
def test_a_pod_that_has_ended_keeps_no_annotation(state: State) -> None:
    """Whether its sandbox is taken down before or after the API server says that it has ended."""
    world = World(hold=60.0)
    world.table.know(replace(KUBE, running=False, ended=True, annotations={names.REDIRECTION: "enabled"}))

    async def play() -> None:
        world.be(state)
        await world.sent(1)

    during(world, play)
    assert world.api.values() == [None]
