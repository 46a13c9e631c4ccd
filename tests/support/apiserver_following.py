# SPDX-License-Identifier: Apache-2.0
"""A follower under test beside an API server: what it was told, and whether that is what the server holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from support.apiserver import ApiServer
from support.apiserver_store import matches

from agent.core.model.pods import KubePod
from agent.sources.kube import objects
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client
from agent.sources.kube.follower import Follower
from agent.sources.kube.protocol import Pace

QUICK = Pace(first=0.02, last=0.2, longest=1, watch=20, slack=1, quiet=0.5, silence=0.5, page=10)
SHORT = Pace(first=0.02, last=0.2, longest=1, watch=1, slack=0.5, quiet=0.5, page=10)
HERE = {"fieldSelector": "spec.nodeName=node1"}
PODS = "/api/v1/pods"


class Told:
    """A sink that keeps the state it was told of; `lists` are the UIDs of each list."""

    def __init__(self) -> None:
        self.pods: dict[str, KubePod] = {}
        self.lists: list[set[str]] = []
        self.news = asyncio.Event()

    def listed(self, objects: Sequence[KubePod]) -> None:
        self.pods = {one.uid: one for one in objects}
        self.lists.append(set(self.pods))
        self.news.set()

    def changed(self, object: KubePod) -> None:
        self.pods[object.uid] = object
        self.news.set()

    def removed(self, object: KubePod) -> None:
        self.pods.pop(object.uid, None)
        self.news.set()


class Following:
    """`told` follows the pods of node1."""

    def __init__(self, server: ApiServer, pace: Pace = QUICK, query: Mapping[str, str] = HERE) -> None:
        self.server, self.told, self._query = server, Told(), query
        self.client = Client(Access(server.url, server.token_file, server.ca_file), seconds=1)
        self.follower = Follower(
            self.client, PODS, query=query, decode=objects.pod, sink=self.told, random=random.random, pace=pace
        )

    def expected(self) -> dict[str, KubePod]:
        found = [one for one in self.server.objects("pods") if matches(one, self._query.get("fieldSelector", ""))]
        return {pod.uid: pod for one in found if (pod := objects.pod(one)) is not None}

    async def equal(self) -> None:
        """Returns once what was told is what the server holds; the test's own time limit is the limit."""
        want = self.expected()
        await self.until(lambda: self.told.pods == want)

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not true():
                self.told.news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self.told.news.wait()

    async def watching(self, watches: int = 1) -> None:
        """Returns once that many watches were accepted, the last of them on the server too."""
        await self.until(lambda: self.follower.since.watches >= watches and self.server.conversation.watching)


@contextlib.asynccontextmanager
async def following(server: ApiServer, **more: Any) -> AsyncIterator[Following]:
    """A follower that runs, and was synced once unless the server does not let it."""
    here = Following(server, **more)
    running = asyncio.create_task(here.follower.run())
    try:
        yield here
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await here.client.close()
