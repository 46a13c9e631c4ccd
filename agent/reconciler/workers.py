"""Worker threads that take what is waiting in batches.

Handing each pod's kernel work over alone costs more than the work: two threads then take turns at the
interpreter for every system call. In a batch the event loop sleeps until all of it is done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
BATCH = 32  # so that a new pod waits behind few others


class Workers:
    """`count` threads; all methods belong to the event loop's thread."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="kernel")
        self._idle = count
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, on a worker."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((function, future))
        self._start()
        return await future

    def close(self) -> None:
        """Waits for what is being done; what waits is dropped."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle and self._waiting:
            self._idle -= 1
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._pool.submit(self._work, loop, batch)

    def _work(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Callable[[], Any], asyncio.Future[Any]]]
    ) -> None:
        results: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        for function, future in batch:
            if future.cancelled():
                continue
            try:
                results.append((future, function(), None))
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                results.append((future, None, error))
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver, results)

    def _deliver(self, results: list[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
        self._idle += 1
        for future, result, error in results:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._start()
