"""The last connections that ended, numbered, so that whoever follows learns how many it missed. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Generic, TypeVar

R = TypeVar("R")
V = TypeVar("V")


class Recent(Generic[R, V]):
    """At most `limit` records, numbered from 1 in the order in which they came. One thread: the event loop's.

    They are kept as they came, and `read` when somebody asks: most never are.
    """

    def __init__(self, read: Callable[[R], V], limit: int = 4096) -> None:
        self._read = read
        self._kept = deque[R](maxlen=limit)
        self._listeners: list[Callable[[], None]] = []
        self.number = 0  # of the newest

    @property
    def followed(self) -> bool:
        """Somebody listens."""
        return bool(self._listeners)

    def add(self, records: Collection[R]) -> None:
        if not records:
            return
        self._kept.extend(records)
        self.number += len(records)
        for told in tuple(self._listeners):
            told()

    def last(self, count: int, keep: Callable[[V], bool]) -> list[V]:
        """The newest `count` of those to keep, oldest first."""
        return list(islice(filter(keep, map(self._read, reversed(self._kept))), max(0, count)))[::-1]

    def since(self, number: int, keep: Callable[[V], bool], most: int) -> tuple[list[V], int, int]:
        """What came after that number: (the first `most` of those to keep, lost, the number up to which this is).

        Lost counts all that came after it and are no longer here, to be kept or not. A number that there was not yet
        is of an earlier agent: then nothing is known to be lost, and all that is here is new.
        """
        if number > self.number:
            number = self.number - len(self._kept)
        lost = max(0, self.number - len(self._kept) - number)
        found = list[V]()
        at = number + lost
        for raw in list(islice(reversed(self._kept), self.number - at))[::-1]:
            if len(found) == most:
                break
            at += 1
            if keep(record := self._read(raw)):
                found.append(record)
        return found, lost, at

    @contextmanager
    def listening(self, told: Callable[[], None]) -> Iterator[None]:
        """`told` is called after each addition meanwhile."""
        self._listeners.append(told)
        try:
            yield
        finally:
            self._listeners.remove(told)
