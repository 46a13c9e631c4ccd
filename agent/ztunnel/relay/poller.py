# SPDX-License-Identifier: Apache-2.0
"""Readiness and deadlines for thousands of sockets, at one system call per socket.

asyncio's add_reader and add_writer cost an epoll_ctl and a Handle for every change of interest. Here a socket is
registered once, edge-triggered, for all events, and asyncio watches the epoll descriptor itself. A reset is seen even
while no read is pending, because the kernel always reports errors.

A descriptor closed while a batch of events runs may come back as another socket in the same batch: what is registered
meanwhile gets no event of that batch, which would be its predecessor's.
"""

from __future__ import annotations

import asyncio
import itertools
import select
from collections.abc import Callable
from typing import Protocol

READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
END = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITE = select.EPOLLOUT
ERROR = select.EPOLLERR
URGENT = select.EPOLLPRI

_EVENTS = 8  # handled at one wake-up, then accepting and others' timers get their turn

Handler = Callable[[int], None]


class Poller:
    """Calls a handler with the event mask at each edge. One thread, bound to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._fresh: set[int] = set()  # registered since the batch began
        loop.add_reader(self._epoll.fileno(), self._run)

    def add(self, fd: int, handler: Handler) -> None:
        """Registers a handler; its first call follows soon, with the current state. Raises OSError: out of memory."""
        self._epoll.register(
            fd, select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
        )
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def remove(self, fd: int) -> None:
        """Removes the handler; call it right before closing `fd`, which removes it from the kernel's set."""
        self._handlers.pop(fd, None)

    def close(self) -> None:
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _run(self) -> None:
        handlers = self._handlers
        fresh = self._fresh
        fresh.clear()
        for fd, mask in self._epoll.poll(0, _EVENTS):
            handler = handlers.get(fd)
            if handler is None or fd in fresh:
                continue
            try:
                handler(mask)
            except Exception as error:  # noqa: BLE001 - one connection's defect must not lose the others' edges
                self.loop.call_exception_handler({"message": "ztunnel: event handler", "exception": error})


class Waiting(Protocol):
    """An operation with a deadline."""

    def expire(self) -> None:
        """Gives up; called once, unless `Deadlines.settle` came first."""


class Deadlines:
    """One timer for all operations with the same time limit: the first one added expires first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._queue: dict[Waiting, float] = {}  # in the order of their deadlines
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiting: Waiting) -> None:
        due = self._loop.time() + self._seconds
        self._queue[waiting] = due
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._expire)

    def settle(self, waiting: Waiting) -> None:
        """Removes an operation. Without this, all connections of the last seconds would stay in memory."""
        self._queue.pop(waiting, None)

    def close(self) -> None:
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        now = self._loop.time()
        self._timer = None
        late = list(itertools.takewhile(lambda waiting: self._queue[waiting] <= now, self._queue))
        for waiting in late:
            del self._queue[waiting]
        for first in self._queue.values():
            self._timer = self._loop.call_at(first, self._expire)
            break
        for waiting in late:
            try:
                waiting.expire()
            except Exception as error:  # noqa: BLE001 - one's defect must not keep the others waiting for ever
                self._loop.call_exception_handler({"message": "ztunnel: deadline", "exception": error})
