# SPDX-License-Identifier: Apache-2.0
"""The last connections that ended, numbered, so that a follower learns how many it missed. Pure.

Those that ended badly have a share of their own: thousands that ended well do not push out the few that failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Generic, TypeVar

R = TypeVar("R")
V = TypeVar("V")


class Recent(Generic[R, V]):
    """Keeps at most `limit` records, numbered from 1 in the order of arrival. For the event loop's thread.

    They are kept encoded and decoded by `read` on request: most never are. Of older ones it keeps the last `share` for
    which `bad` is True, for `last` only.
    """

    def __init__(
        self, read: Callable[[R], V], limit: int = 4096, bad: Callable[[R], bool] | None = None, share: int = 1024
    ) -> None:
        self._read = read
        self._limit = limit
        self._bad = bad
        self._kept = deque[R](maxlen=limit)
        self._older = deque[R](maxlen=share)  # bad ones that are no longer in `_kept`
        self._listeners: list[Callable[[], None]] = []
        self.number = 0  # of the newest

    @property
    def followed(self) -> bool:
        """True while a follower listens."""
        return bool(self._listeners)

    def add(self, records: Collection[R]) -> None:
        if not records:
            return
        if self._bad and (excess := len(self._kept) + len(records) - self._limit) > 0:
            self._older.extend(filter(self._bad, islice(chain(self._kept, records), excess)))
        self._kept.extend(records)
        self.number += len(records)
        for notify in tuple(self._listeners):
            notify()

    def last(self, count: int, keep: Callable[[V], bool]) -> list[V]:
        """Returns the newest `count` records for which `keep` is True, oldest first."""
        newest = map(self._read, chain(reversed(self._kept), reversed(self._older)))
        return list(islice(filter(keep, newest), max(0, count)))[::-1]

    def since(self, number: int, keep: Callable[[V], bool], most: int) -> tuple[list[V], int, int]:
        """Returns (the first `most` records after `number` for which `keep` is True, lost, the last number read).

        `lost` counts the records after `number` that are no longer here, with or without `keep`. A number that is too
        high is from an earlier agent: then no loss is known, and all records are new.
        """
        if number > self.number:
            number = self.number - len(self._kept)
        lost = max(0, self.number - len(self._kept) - number)
        records = list[V]()
        at = number + lost
        for raw in list(islice(reversed(self._kept), self.number - at))[::-1]:
            if len(records) == most:
                break
            at += 1
            if keep(record := self._read(raw)):
                records.append(record)
        return records, lost, at

    @contextmanager
    def listening(self, notify: Callable[[], None]) -> Iterator[None]:
        """Calls `notify` after each addition inside the context."""
        self._listeners.append(notify)
        try:
            yield
        finally:
            self._listeners.remove(notify)
