# SPDX-License-Identifier: Apache-2.0
"""The node's history over the admin API: past events, and future ones by long polling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from agent.core.model.history_event import HistoryEvent
from agent.core.model.pods import PodTable
from agent.core.policy.history import Selection, selection
from agent.core.text import natural
from agent.export.following import Followers
from agent.kernel.http import Request
from agent.sources.state.history_file import HistoryFile


class EventsApi:
    """Answers GET /v1/events."""

    def __init__(self, history: HistoryFile, table: PodTable) -> None:
        self._history = history
        self._table = table
        self._followers = Followers()

    async def events(self, request: Request) -> dict[str, Any]:
        """Returns the events that the query chooses. Raises SluiceError.

        With `after` (the `next` of an earlier answer) those that happened or were repeated since then; it waits for
        them up to `wait` seconds.
        """
        query = request.query
        chosen = selection({**query, "pod": self._name(query.get("pod", ""))}, time.time())
        loop = asyncio.get_running_loop()
        events = list[HistoryEvent]()
        number = 0

        def listening(notify: Callable[[], None]) -> AbstractContextManager[None]:
            return self._history.listening(lambda: loop.call_soon_threadsafe(notify))

        def found() -> bool:
            nonlocal events, number
            events, number = self._history.select(chosen)
            return bool(events)

        await self._followers.wait(natural(query, "wait"), listening, found)
        return {"events": [one.as_dict() for one in events], "next": number}

    def of_pod(self, key: str, count: int) -> list[dict[str, Any]]:
        """Returns the last `count` events of the pod namespace/name."""
        return [one.as_dict() for one in self._history.select(Selection(pod=key))[0][-count:]]

    def close(self) -> None:
        """Answers all waiting requests now: the agent ends."""
        self._followers.close()

    def _name(self, name: str) -> str:
        """Returns namespace/name if it is the UID of a pod on this node, else the name: events outlive their pod."""
        pod = self._table.get(name)
        return pod.key if pod else name
