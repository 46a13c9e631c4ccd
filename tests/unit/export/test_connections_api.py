# SPDX-License-Identifier: Apache-2.0
"""GET /v1/connections: what there is, and long polling for what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodTable
from agent.export.connections_api import ConnectionsApi
from agent.flows.recent import Recent
from agent.flows.record import Connection, Direction, Fate, Reason
from agent.flows.resolved_record import ResolvedRecord
from agent.kernel.http import Request

OPEN = Connection(
    pod=1,
    socket=0,
    direction=Direction.OUTBOUND,
    fate=Fate.CAPTURED,
    reason=Reason.NONE,
    local=("10.0.0.1", 4000),
    remote=("10.0.0.2", 80),
    opened=1.0,
)
WEB, API = Pod("u1", "shop", "web"), Pod("u2", "shop", "api")


def record(socket: int, pod: str = "web", fate: Fate = Fate.CAPTURED, namespace: str = "shop") -> ResolvedRecord:
    return ResolvedRecord(
        connection=replace(OPEN, socket=socket, fate=fate, closed=2.0), node="n1", pod=pod, namespace=namespace
    )


class Account:
    def __init__(self) -> None:
        self.name, self.recent = "ebpf", Recent[ResolvedRecord, ResolvedRecord](lambda raw: raw, 20)
        self.open = [record(1), record(2, "api", Fate.LEAKED)]

    async def look(self) -> None:
        pass

    def live(self, pod: Pod | None) -> list[dict[str, Any]]:
        return [each.as_dict() for each in self.open if pod is None or each.pod == pod.name]

    def losses(self) -> dict[str, int]:
        return {"records": 3}


class Bench:
    def __init__(self) -> None:
        self.account, table = Account(), PodTable()
        for pod in (WEB, API, Pod("u3", "bank", "api")):
            table.seen(pod)
        self.records = ConnectionsApi(self.account, table)

    async def ask(self, **query: str) -> Any:
        return await self.records.connections(Request("GET", "/v1/connections", query))

    async def refused(self, **query: str) -> str:
        with pytest.raises(SluiceError) as caught:
            await self.ask(**query)
        return str(caught.value)

    async def waiting(self, **query: str) -> asyncio.Task[Any]:
        """A question that is being kept."""
        task = asyncio.create_task(self.ask(wait="30", **query))
        for _ in range(5):  # steps of the event loop, of which it needs one
            await asyncio.sleep(0)
        assert self.records._followers._waiting
        assert not task.done()
        return task


def on_bench(script: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(20):  # less than a question may be kept
            await script(Bench())

    asyncio.run(inside())


def ids(rows: list[dict[str, Any]]) -> list[int]:
    return [row["socket"] for row in rows]


def test_what_there_is() -> None:
    async def script(bench: Bench) -> None:
        bench.account.recent.add([record(number) for number in range(10, 40)])
        told = await bench.ask(limit="3")
        assert (ids(told["live"]), ids(told["ended"])) == ([1, 2], [37, 38, 39])
        assert (told["collector"], told["losses"], told["next"]) == ("ebpf", {"records": 3}, 30)
        assert told["ended"][0] == record(37).as_dict()
        assert ids((await bench.ask())["ended"]) == list(range(20, 40))
        assert (await bench.ask(live="false", limit="0")) == {
            "collector": "ebpf", "live": [], "ended": [], "losses": {"records": 3}, "next": 30,
        }  # fmt: skip

    on_bench(script)


def test_choosing_pods_and_fates() -> None:
    async def script(bench: Bench) -> None:
        bench.account.recent.add([record(10), record(11, "api"), record(12, "web", Fate.LEAKED), record(13, "api")])
        bench.account.recent.add([record(14, "api", namespace="bank")])
        for pod in ("web", "shop/web", "u1"):
            told = await bench.ask(pod=pod)
            assert (ids(told["live"]), ids(told["ended"])) == ([1], [10, 12])
        assert ids((await bench.ask(pod="shop/api"))["ended"]) == [11, 13]
        told = await bench.ask(fate="leaked")
        assert (ids(told["live"]), ids(told["ended"])) == ([2], [12])
        assert ids((await bench.ask(pod="web", fate="leaked", limit="1"))["ended"]) == [12]
        assert ids((await bench.ask(after="0", pod="shop/api"))["ended"]) == [11, 13]

    on_bench(script)


def test_a_pod_that_has_gone_is_known_by_its_connections() -> None:
    async def script(bench: Bench) -> None:
        bench.account.recent.add([record(10, "old"), record(11), record(12, "old", namespace="bank")])
        told = await bench.ask(pod="shop/old")
        assert (ids(told["live"]), ids(told["ended"])) == ([], [10])
        assert ids((await bench.ask(pod="old", limit="1"))["ended"]) == [12]
        assert ids((await bench.ask(pod="old", fate="leaked"))["ended"]) == []
        assert "no pod 'shop/never' on this node" in await bench.refused(pod="shop/never")

    on_bench(script)


def test_mistakes_are_named() -> None:
    async def script(bench: Bench) -> None:
        assert "'api' is ambiguous: bank/api, shop/api" in await bench.refused(pod="api")
        assert "no fate 'lost'; there are undecided, captured" in await bench.refused(fate="lost")
        for key, value in (("after", "x"), ("wait", "-1"), ("after", "²"), ("after", "9" * 99)):
            assert f"{key}: " in await bench.refused(**{"after": "0", key: value})
        assert "limit: '1.5' is not a number" in await bench.refused(limit="1.5")
        with pytest.raises(SluiceError, match="the setting accounting is off"):
            await ConnectionsApi(None, PodTable()).connections(Request("GET", "/v1/connections", {}))

    on_bench(script)


def test_a_question_is_kept_until_something_comes() -> None:
    async def script(bench: Bench) -> None:
        bench.account.recent.add([record(10)])
        waits = await bench.waiting(after="1")
        bench.account.recent.add([record(11), record(12)])
        assert {**await waits, "ended": None} == {"ended": None, "lost": 0, "next": 3}
        assert ids(waits.result()["ended"]) == [11, 12]
        assert not bench.account.recent.followed

    on_bench(script)


def test_it_waits_on_when_only_others_came() -> None:
    async def script(bench: Bench) -> None:
        waits = await bench.waiting(after="0", pod="web")
        for _ in range(3):
            bench.account.recent.add([record(20, "api")])
            await asyncio.sleep(0)
            assert not waits.done()
        bench.account.recent.add([record(21)])
        assert (ids((await waits)["ended"]), waits.result()["next"]) == ([21], 4)

    on_bench(script)


def test_lost_ones_are_told_at_once() -> None:
    async def script(bench: Bench) -> None:
        waits = await bench.waiting(after="0", pod="web")
        bench.account.recent.add([record(number, "api") for number in range(50)])
        assert await waits == {"ended": [], "lost": 30, "next": 50}

    on_bench(script)


def test_without_waiting_or_when_the_agent_ends_it_answers_at_once() -> None:
    async def script(bench: Bench) -> None:
        nothing = {"ended": [], "lost": 0, "next": 0}
        assert await bench.ask(after="0") == await bench.ask(after="0", wait="0") == nothing
        waits = await bench.waiting(after="0")
        bench.records.close()
        assert await waits == await bench.ask(after="0", wait="30") == nothing

    on_bench(script)


def test_a_follower_sees_each_record_once_whatever_comes_while_it_asks() -> None:
    async def script(bench: Bench) -> None:
        got, at, room = list[int](), 0, asyncio.Semaphore(20)  # not more at once than are kept

        async def produce() -> None:
            for number in range(200):
                await room.acquire()
                bench.account.recent.add([record(number)])
                if number % 3 == 0:
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            while len(got) < 200:
                answer = await bench.ask(after=str(at), wait="30")
                assert answer["lost"] == 0
                got, at = got + ids(answer["ended"]), answer["next"]
                for _ in answer["ended"]:
                    room.release()
        assert got == list(range(200))

    on_bench(script)
