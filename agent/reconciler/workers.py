# SPDX-License-Identifier: Apache-2.0
"""Worker threads that take waiting work in batches, and the waits of the loops that feed them.

Dispatching each pod's kernel work separately costs more than the work: two threads then take turns at the interpreter
for every system call. During a batch the event loop sleeps until all of it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
BATCH = 32  # so that a new pod waits behind few others


Work = tuple[Callable[[], Any], asyncio.Future[Any]]
Result = tuple[asyncio.Future[Any], Any, Exception | None]


class Workers:
    """Runs `count` threads; all methods except `_work` and `_next` belong to the event loop's thread."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="kernel")
        self._idle = count
        self._first: deque[Work] = deque()  # a caller waits for it, such as a CNI ADD
        self._waiting: deque[Work] = deque()

    async def run(self, function: Callable[[], T], *, first: bool = False) -> T:
        """Runs `function` on a worker and returns its result. Work that is `first` precedes all other waiting work."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        (self._first if first else self._waiting).append((function, future))
        if self._idle:
            self._idle -= 1
            self._pool.submit(self._work, asyncio.get_running_loop())
        return await future

    def close(self) -> None:
        """Waits for running work; drops waiting work."""
        self._first.clear()
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Does one batch; ends early after the last work that is `first`, since callers await its results."""
        results: list[Result] = []
        while len(results) < BATCH and (work := self._next()):
            (function, future), urgent = work
            if future.cancelled():
                continue
            try:
                results.append((future, function(), None))
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                results.append((future, None, error))
            if urgent and not self._first:
                break
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver, loop, results)

    def _next(self) -> tuple[Work, bool] | None:
        for queue in (self._first, self._waiting):
            try:
                return queue.popleft(), queue is self._first
            except IndexError:  # empty, or another worker was faster
                continue
        return None

    def _deliver(self, loop: asyncio.AbstractEventLoop, results: list[Result]) -> None:
        for future, result, error in results:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        if self._first or self._waiting:
            self._pool.submit(self._work, loop)
        else:
            self._idle += 1


async def woken(wakeup: asyncio.Event, due: float | None) -> None:
    """Returns when `wakeup` is set, or at `due` on the monotonic clock."""
    timeout = None if due is None else max(0.0, due - time.monotonic())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):  # wait_for may swallow the cancellation (cpython#86296)
            await wakeup.wait()


def resolve(waiters: list[asyncio.Future[T]], result: T) -> None:
    """Hands `result` to the waiters that have not given up."""
    for waiter in waiters:
        if not waiter.done():  # done: its caller had no more time
            waiter.set_result(result)
