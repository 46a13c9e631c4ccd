# SPDX-License-Identifier: Apache-2.0
"""Runs deferred accounting work on a thread of its own: no pod's capture or repair waits for it."""

from __future__ import annotations

import asyncio

from agent.core.model.pods import Pod
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.interfaces import Accounting
from agent.reconciler.workers import Workers


class AccountingQueue:
    """Handles one pod at a time, in the order of their passes; each takes as long as the kernel waits for all CPUs."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting
        self._worker = Workers(1)
        self._due: dict[str, tuple[Pod, PodNetns, asyncio.Lock]] = {}
        self._wakeup = asyncio.Event()

    def due(self, pod: Pod, target: PodNetns, lock: asyncio.Lock) -> None:
        """Queues the pod after a pass; further passes may precede its turn. `lock` is that of its namespace."""
        self._due[pod.uid] = (pod, target, lock)
        self._wakeup.set()

    def forget(self, uid: str) -> None:
        """Drops the pod; call it before the lock is taken to close the namespace."""
        self._due.pop(uid, None)

    async def run(self) -> None:
        """Runs until cancelled; `close` finishes the work under way."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._due:
                uid, (_, _, lock) = next(iter(self._due.items()))
                async with lock:
                    due = self._due.get(uid)
                    if due is not None and due[2] is lock:  # neither forgotten nor in another namespace meanwhile
                        del self._due[uid]
                        await self._watch(due[0], due[1])

    async def _watch(self, pod: Pod, target: PodNetns) -> None:
        await self._worker.run(lambda: self._accounting.watch(pod, target))

    def close(self) -> None:
        self._worker.close()
