# SPDX-License-Identifier: Apache-2.0
"""Waits for changes in directories, which may be removed, created again or be links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from agent.core.errors import KernelError
from agent.kernel.inotify import Inotify

log = logging.getLogger("sluice.install")


class DirectoryWatch:
    """Watches any number of directories for one waiter.

    Without inotify it only waits: the waiter looks at intervals in any case.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._changed = asyncio.Event()
        self._watched: dict[Path, tuple[int, tuple[int, int]]] = {}
        self._queue: Inotify | None = None

    def follow(self, directories: Iterable[Path]) -> None:
        """Watches exactly these directories. The next call finds one that is created later."""
        wanted = {path: key for path in directories if (key := _key(path))}
        try:
            if self._queue is None:
                self._queue = Inotify()
                asyncio.get_running_loop().add_reader(self._queue, self._happened)
            for path in [path for path, (_, key) in self._watched.items() if wanted.get(path) != key]:
                self._forget(path)
            for path in wanted.keys() - self._watched.keys():
                self._watched[path] = (self._queue.add(path), wanted[path])
                self._changed.set()  # what happened between looking and watching
            self._report("")
        except KernelError as error:
            self._report(f"{error}; polling instead: raise fs.inotify.max_user_watches and max_user_instances")

    async def wait(self, seconds: float) -> bool:
        """Waits for a change, at most `seconds`. Returns True if there was one."""
        with contextlib.suppress(TimeoutError):
            # Not wait_for: that of Python 3.11 loses a cancellation that comes together with the event.
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        happened = self._changed.is_set()
        self._changed.clear()
        return happened

    def close(self) -> None:
        if self._queue is not None:
            asyncio.get_running_loop().remove_reader(self._queue)
            self._queue.close()
            self._queue = None
        self._watched.clear()

    def _happened(self) -> None:
        if self._queue is not None and self._queue.take():
            self._changed.set()

    def _forget(self, path: Path) -> None:
        watch, _ = self._watched.pop(path)
        if self._queue is not None and watch not in {other for other, _ in self._watched.values()}:
            self._queue.remove(watch)

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            if problem:
                log.warning("cannot watch directories: %s", problem)


def _key(path: Path) -> tuple[int, int] | None:
    """Returns the identity of the directory, which changes when the name leads to another one."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
