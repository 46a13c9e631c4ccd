"""What is left to do for pods' accounts, on a thread of its own: no pod's capture or repair waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from agent.core.pods import Pod
from agent.reconciler.enrolment import Enrolled
from agent.reconciler.entry import Entry


class Watching:
    """One pod at a time, in the order of their passes; `work` blocks, for as long as the kernel waits for all CPUs."""

    def __init__(self, work: Callable[[Pod, Enrolled], None]) -> None:
        self._work = work
        self._due: dict[str, tuple[Pod, Entry, Enrolled]] = {}
        self._wakeup = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="watching")

    def due(self, pod: Pod, entry: Entry, found: Enrolled) -> None:
        """After a pass over the pod, which may be looked at again before its turn."""
        self._due[pod.uid] = (pod, entry, found)
        self._wakeup.set()

    def forget(self, uid: str) -> None:
        """To be called before the pod's lock is taken to let its namespace go."""
        self._due.pop(uid, None)

    async def run(self) -> None:
        """Until cancelled; what is under way is finished by `close`."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._due:
                uid, (_, entry, _) = next(iter(self._due.items()))
                async with entry.lock:
                    now = self._due.pop(uid, None)  # as it is by now: None if it was forgotten meanwhile
                    if now is not None and now[1] is entry:
                        await asyncio.get_running_loop().run_in_executor(self._pool, self._work, now[0], now[2])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
