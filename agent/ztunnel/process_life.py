# SPDX-License-Identifier: Apache-2.0
"""The start and the end of a ztunnel process, a node's or a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from agent.kernel import logs
from agent.ztunnel.relay.poller import Poller

LOOK_SECONDS: Final = 0.05  # between two looks at what still lives

T = TypeVar("T")

log = logging.getLogger(__name__)


def run(serve: Callable[[Poller], Coroutine[Any, Any, T]]) -> T:
    """Runs `serve` in an event loop of the poller's, with logs and as many descriptors as the process may have."""
    logs.start(logging.INFO, "%(asctime)s %(levelname)s ztunnel %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    poller = Poller()
    with asyncio.Runner(loop_factory=lambda: poller.loop) as runner:
        return runner.run(serve(poller))


class Ending:
    """Counts the signals that ask to end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask)

    def ask(self) -> None:
        """Asks the process to end; the second time, at once."""
        (self.urgent if self.asked.is_set() else self.asked).set()

    async def pause(self, seconds: float) -> None:
        """Waits `seconds`, or less if a second signal comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.urgent.wait()

    async def drain(self, is_live: Callable[[], bool], seconds: float) -> None:
        """Waits until nothing lives any more, at most `seconds`, or less if a second signal comes."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while is_live():
            if self.urgent.is_set() or loop.time() >= until:
                log.info("the drain time is over: resetting open connections")
                break
            await self.pause(LOOK_SECONDS)
