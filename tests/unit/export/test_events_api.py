# SPDX-License-Identifier: Apache-2.0
"""GET /v1/events: what is chosen, and a follower that waits."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from agent.core.errors import SluiceError
from agent.core.model.history_event import EventKind
from agent.core.model.pods import Pod, PodTable
from agent.export.events_api import EventsApi
from agent.kernel.http import Request
from agent.sources.state.history_file import HistoryFile


class Bench:
    def __init__(self) -> None:
        table = PodTable()
        table.seen(Pod("u1", "shop", "web", source="cni"))
        self.history = HistoryFile("/nonexistent", 1 << 20, "n1")  # in memory: it is never opened
        self.api = EventsApi(self.history, table)

    def note(self, text: str, pod: str = "web") -> None:
        self.history.note(EventKind.REPAIRED, text, namespace="shop", pod=pod)

    async def ask(self, **query: str) -> dict[str, Any]:
        return await self.api.events(Request("GET", "/v1/events", query))

    async def texts(self, **query: str) -> list[str]:
        return [row["text"] for row in (await self.ask(**query))["events"]]


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.note("a")
    made.note("b", "db")
    return made


def test_what_is_chosen(bench: Bench) -> None:
    async def script() -> None:
        answer = await bench.ask()
        assert answer["next"] == 2
        assert answer["events"][0] == {
            **answer["events"][0],
            **{"node": "n1", "namespace": "shop", "pod": "web", "kind": "repaired", "text": "a", "count": 1, "by": ""},
        }
        assert await bench.texts() == ["a", "b"]
        for name in ("u1", "web", "shop/web"):
            assert await bench.texts(pod=name) == ["a"]
        assert await bench.texts(pod="gone") == []
        assert await bench.texts(since="10m") == ["a", "b"]
        assert await bench.texts(until="10m") == []
        for query in ({"since": "now"}, {"wait": "x"}, {"after": "-1"}):
            with pytest.raises(SluiceError):
                await bench.ask(**query)

    asyncio.run(script())
    assert [row["text"] for row in bench.api.of_pod("shop/web", 5)] == ["a"]


def test_a_follower_waits_for_events_of_any_thread(bench: Bench) -> None:
    async def script() -> None:
        waiting = asyncio.create_task(bench.ask(after="2", wait="20", pod="web"))
        await asyncio.sleep(0)
        bench.note("b", "db")  # not of this pod
        thread = threading.Thread(target=lambda: bench.note("c"))
        thread.start()
        thread.join()
        answer = await waiting
        assert [row["text"] for row in answer["events"]] == ["c"] and answer["next"] == 4

    asyncio.run(script())


def test_a_follower_is_answered_at_the_end(bench: Bench) -> None:
    async def script() -> None:
        waiting = asyncio.create_task(bench.ask(after="2", wait="20"))
        await asyncio.sleep(0)
        bench.api.close()
        assert await waiting == {"events": [], "next": 2}
        assert await bench.ask(after="2", wait="20") == {"events": [], "next": 2}

    asyncio.run(script())
