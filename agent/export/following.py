# SPDX-License-Identifier: Apache-2.0
"""Records over the admin API: numbers in questions, and long polling for records that are yet to come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from agent.core.errors import SluiceError
from agent.flows.recent import Recent

_MOST = 500  # records in one answer to a follower: it asks again for the next
_LONGEST = 30  # seconds that it may be kept waiting


class _Record(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=_Record)


class Followers:
    """Those who wait for records."""

    def __init__(self) -> None:
        self._waiting = set[asyncio.Event]()
        self._closed = False

    async def records(
        self, recent: Recent[Any, R], query: Mapping[str, str], keep: Callable[[R], bool], name: str
    ) -> dict[str, Any]:
        """Returns as `name` the records after number `after`, and waits for them up to `wait` seconds.

        `lost` counts records of any pod that were overwritten between two requests. Raises SluiceError.
        """
        at, wait = whole(query, "after", 0), whole(query, "wait", 0)
        records = list[R]()
        lost = 0
        arrived = asyncio.Event()
        self._waiting.add(arrived)
        try:
            with recent.listening(arrived.set), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, _LONGEST)):
                    while True:
                        arrived.clear()
                        records, missed, at = recent.since(at, keep, _MOST)
                        lost += missed
                        if records or lost or self._closed:
                            break
                        await arrived.wait()
        finally:
            self._waiting.discard(arrived)
        return {name: [record.as_dict() for record in records], "lost": lost, "next": at}

    def close(self) -> None:
        """Answers all now: the agent ends."""
        self._closed = True
        for arrived in self._waiting:
            arrived.set()


def whole(query: Mapping[str, str], key: str, default: int) -> int:
    """Returns a number of the question. Raises SluiceError for anything else."""
    text = query.get(key, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise SluiceError(f"{key}: {text!r} is not a number")
    return int(text or default)
