# SPDX-License-Identifier: Apache-2.0
"""Readiness and deadlines for thousands of sockets, at one system call per socket.

asyncio's add_reader and add_writer cost an epoll_ctl and a Handle for every change of interest. Here a socket is
registered once, edge-triggered, for all events. A reset is seen even while no read is pending, because the kernel
always reports errors. The poller is the selector of its event loop, and handlers run while it selects: through a reader
of asyncio that watched a second epoll descriptor, a wake-up cost twice as much. `copier` waits in its place as long as
it has pairs of sockets.

A descriptor closed while a batch of events runs may come back as another socket in the same batch: what is registered
meanwhile gets no event of that batch, which would be its predecessor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import select
import selectors
from collections.abc import Callable, Mapping
from selectors import SelectorKey
from typing import Any, Protocol

from agent.kernel.pair_copier import pair_copier

READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
END = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITE = select.EPOLLOUT
ERROR = select.EPOLLERR
URGENT = select.EPOLLPRI

_EVENTS = 8  # handled at one wake-up, then accepting and others' timers get their turn
_EDGES = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

Handler = Callable[[int], None]
FileDescriptorLike = Any  # an integer, or what has fileno()


class Poller(selectors.BaseSelector):
    """Calls a handler with the event mask at each edge, and serves `loop`, which it makes, as its selector.

    One thread. Closing the loop closes the poller.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._keys: dict[int, SelectorKey] = {}  # what asyncio itself waits for
        self._fresh: set[int] = set()  # registered since the batch began
        self.copier = pair_copier()
        self.loop = asyncio.SelectorEventLoop(self)

    def add(self, fd: int, handler: Handler) -> None:
        """Registers a handler; its first call follows soon, with the current state. Raises OSError: out of memory."""
        self._epoll.register(fd, _EDGES)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def listen(self, fd: int, handler: Handler) -> None:
        """Registers a listener that several processes may have: the kernel wakes one of those that wait.

        The one that registered first comes first (EPOLLEXCLUSIVE). While a connection waits the handler is called again
        and again. Raises OSError: out of memory.
        """
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def unlisten(self, fd: int) -> None:
        """Removes a listener; to close it is not enough while another process has it open."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def remove(self, fd: int) -> None:
        """Removes the handler; call it right before closing `fd`, which removes it from the kernel's set."""
        self._handlers.pop(fd, None)

    # The selector of asyncio

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> SelectorKey:
        """Implements BaseSelector."""
        key = SelectorKey(fileobj, _number(fileobj), events, data)
        self._epoll.register(key.fd, _interest(events))
        self._keys[key.fd] = key
        self._fresh.add(key.fd)
        return key

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> SelectorKey:
        """Implements BaseSelector."""
        key = SelectorKey(fileobj, _number(fileobj), events, data)
        self._epoll.modify(key.fd, _interest(events))
        self._keys[key.fd] = key
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> SelectorKey:
        """Implements BaseSelector."""
        key = self._keys.pop(_number(fileobj))
        with contextlib.suppress(OSError):  # closed already
            self._epoll.unregister(key.fd)
        return key

    def get_map(self) -> Mapping[FileDescriptorLike, SelectorKey]:
        """Implements BaseSelector."""
        return self._keys

    def close(self) -> None:
        """Implements BaseSelector; the loop calls it."""
        self._handlers.clear()
        self._keys.clear()
        self._epoll.close()

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Waits for events, at most `timeout` seconds. Calls the handlers; returns what asyncio waits for."""
        handlers = self._handlers
        fresh = self._fresh
        fresh.clear()
        ready: list[tuple[SelectorKey, int]] = []
        copier = self.copier
        if copier is not None and copier.pairs:
            events = copier.poll(self._epoll.fileno(), _wait(timeout))
        else:
            events = self._epoll.poll(_wait(timeout), _EVENTS)
        for fd, mask in events:
            if fd in fresh:
                continue
            handler = handlers.get(fd)
            if handler is None:
                if (key := self._keys.get(fd)) is not None:
                    ready.append((key, _events(mask) & key.events))
                continue
            try:
                handler(mask)
            except Exception as error:  # noqa: BLE001 - one connection's defect must not lose the others' edges
                self.loop.call_exception_handler({"message": "ztunnel: event handler", "exception": error})
        return ready


def _number(fileobj: FileDescriptorLike) -> int:
    number: int = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    return number


def _interest(events: int) -> int:
    reading = select.EPOLLIN if events & selectors.EVENT_READ else 0
    return reading | (select.EPOLLOUT if events & selectors.EVENT_WRITE else 0)


def _events(mask: int) -> int:
    """Returns the events of `selectors`: an error or end makes a socket readable and writable."""
    reading = selectors.EVENT_READ if mask & ~select.EPOLLOUT else 0
    return reading | (selectors.EVENT_WRITE if mask & ~select.EPOLLIN else 0)


def _wait(timeout: float | None) -> float:
    """Returns the timeout as epoll takes it: whole milliseconds, not less than was asked for."""
    if timeout is None:
        return -1
    return 0 if timeout <= 0 else math.ceil(timeout * 1e3) * 1e-3


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
