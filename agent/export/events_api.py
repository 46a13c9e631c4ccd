# SPDX-License-Identifier: Apache-2.0
"""The node's history over the admin API: past events, and future ones by long polling."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from agent.core.model.pods import PodTable
from agent.core.policy.history import Selection, natural, selection
from agent.kernel.http import Request
from agent.sources.state.history_file import HistoryFile

_LONGEST = 30  # seconds that a follower may be kept waiting


class EventsApi:
    """Answers GET /v1/events."""

    def __init__(self, history: HistoryFile, table: PodTable) -> None:
        self._history = history
        self._table = table
        self._waiting = set[asyncio.Event]()
        self._closed = False

    async def events(self, request: Request) -> dict[str, Any]:
        """Returns the events that the query chooses. Raises SluiceError.

        With `after` (the `next` of an earlier answer) those that happened or were repeated since then; it waits for
        them up to `wait` seconds.
        """
        query = request.query
        chosen = selection({**query, "pod": self._name(query.get("pod", ""))}, time.time())
        wait = natural(query, "wait")
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._waiting.add(arrived)
        try:
            notified = self._history.listening(lambda: loop.call_soon_threadsafe(arrived.set))
            with notified, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, _LONGEST)):
                    while True:
                        arrived.clear()
                        events, number = self._history.select(chosen)
                        if events or self._closed:
                            break
                        await arrived.wait()
        finally:
            self._waiting.discard(arrived)
        return {"events": [one.as_dict() for one in events], "next": number}

    def of_pod(self, key: str, count: int) -> list[dict[str, Any]]:
        """Returns the last `count` events of the pod namespace/name."""
        return [one.as_dict() for one in self._history.select(Selection(pod=key))[0][-count:]]

    def close(self) -> None:
        """Answers all waiting requests now: the agent ends."""
        self._closed = True
        for arrived in self._waiting:
            arrived.set()

    def _name(self, name: str) -> str:
        """Returns namespace/name if it is the UID of a pod on this node, else the name: events outlive their pod."""
        pod = self._table.get(name)
        return pod.key if pod else name
