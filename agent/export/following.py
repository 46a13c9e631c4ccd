# SPDX-License-Identifier: Apache-2.0
"""Long polling over the admin API: a question waits for what is yet to come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from agent.core.text import natural
from agent.flows.recent import Recent

_MOST = 500  # records in one answer to a follower: it asks again for the next
_LONGEST = 30  # seconds that it may be kept waiting


class _Record(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=_Record)
Listening = Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]]


class Followers:
    """Those who wait for something new."""

    def __init__(self) -> None:
        self._waiting = set[asyncio.Event]()
        self._closed = False

    async def wait(self, seconds: int, listening: Listening, found: Callable[[], bool]) -> None:
        """Returns once `found` is True, which is called at first and after each news, at `close`, or after `seconds`.

        `listening` makes a context in which news call its argument, on the event loop.
        """
        arrived = asyncio.Event()
        self._waiting.add(arrived)
        try:
            with listening(arrived.set), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(seconds, _LONGEST)):
                    while True:
                        arrived.clear()
                        if found() or self._closed:
                            break
                        await arrived.wait()
        finally:
            self._waiting.discard(arrived)

    async def records(
        self, recent: Recent[Any, R], query: Mapping[str, str], keep: Callable[[R], bool], name: str
    ) -> dict[str, Any]:
        """Returns as `name` the records after number `after`, and waits for them up to `wait` seconds.

        `lost` counts records of any pod that were overwritten between two requests. Raises SluiceError.
        """
        at, wait = natural(query, "after"), natural(query, "wait")
        records = list[R]()
        lost = 0

        def found() -> bool:
            nonlocal records, lost, at
            records, missed, at = recent.since(at, keep, _MOST)
            lost += missed
            return bool(records or lost)

        await self.wait(wait, recent.listening, found)
        return {name: [record.as_dict() for record in records], "lost": lost, "next": at}

    def close(self) -> None:
        """Answers all now: the agent ends."""
        self._closed = True
        for arrived in self._waiting:
            arrived.set()
