# SPDX-License-Identifier: Apache-2.0
"""Reads ztunnel's accept queues in the captured pods, and notes in each pod's state whether ztunnel has stalled there.

A pod without waiting connections costs one lookup per port and reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

from agent.core.errors import SluiceError
from agent.core.model.status import State
from agent.core.policy.accept_queue import NOTHING_WAITS, QueueReading, Stall
from agent.core.text import some
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.interfaces import Journal, NamespaceRegistry, ZtunnelPorts
from agent.reconciler.pod_state import PodState
from agent.reconciler.workers import Workers

log = logging.getLogger("sluice.reconciler")
EVERY: Final = 3.0  # seconds between two readings of all captured pods
SOON: Final = 1.0  # the same for pods in which connections wait
_TOGETHER: Final = 32  # pods in one piece of work: passes over them wait as long
_SHOWN: Final = 3  # pods in one log line


# By position: all are parts of the reconciler, each of another type.
class StallWatch:
    """Watches the pods of `entries`. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        entries: Mapping[str, PodState],
        ports: ZtunnelPorts,
        namespaces: NamespaceRegistry,
        workers: Workers,
        journal: Journal,
    ) -> None:
        self._entries = entries
        self._ports = ports
        self._namespaces = namespaces
        self._workers = workers
        self._journal = journal

    async def run(self) -> None:
        """Runs until cancelled."""
        for step in itertools.count():
            await asyncio.sleep(SOON)
            whole = step % round(EVERY / SOON) == 0
            await self.look([uid for uid, entry in self._entries.items() if whole or entry.stall.suspected])

    async def look(self, uids: Sequence[str]) -> None:
        """Reads the queues of these pods once; a pod that is in a pass or not captured is left out."""
        before = self._stalled()
        for at in range(0, len(uids), _TOGETHER):
            await self._look(uids[at : at + _TOGETHER])
        self._report(before, self._stalled())

    async def _look(self, uids: Sequence[str]) -> None:
        async with contextlib.AsyncExitStack() as held:
            due = list[tuple[PodState, PodNetns]]()
            for uid in uids:
                entry = self._entries.get(uid)
                target = self._namespaces.opened(uid)
                if entry is None or entry.lock.locked():
                    continue
                if target is None or entry.status.state is not State.ENABLED:
                    entry.stall = Stall()
                    continue
                await held.enter_async_context(entry.lock)
                due.append((entry, target))
            if due:
                readings = await self._workers.run(lambda: [self._read(target) for _, target in due])
                now = time.monotonic()
                for (entry, _), reading in zip(due, readings, strict=True):
                    entry.stall.observe(reading, now)

    def _read(self, target: PodNetns) -> QueueReading:
        try:
            return self._ports.waiting(target)
        except (SluiceError, OSError):
            return NOTHING_WAITS  # the pod has gone, or its next pass reports why

    def _stalled(self) -> frozenset[str]:
        return frozenset(uid for uid, entry in self._entries.items() if entry.stall.since is not None)

    def _report(self, before: frozenset[str], now: frozenset[str]) -> None:
        if began := now - before:
            log.warning("ztunnel has stalled: it does not accept connections of %s", self._names(began))
        if ended := frozenset(uid for uid in before - now if self._is_enrolled(uid)):
            log.info("ztunnel accepts connections again: %s", self._names(ended))
        for uids, over in ((began, False), (ended, True)):
            for uid in uids:
                if (entry := self._entries.get(uid)) and entry.decided:
                    self._journal.stalled(entry.decided[0], over=over)

    def _is_enrolled(self, uid: str) -> bool:
        entry = self._entries.get(uid)  # None: the pod is gone
        return entry is not None and entry.status.state is not State.EXCLUDED

    def _names(self, uids: frozenset[str]) -> str:
        entries = [entry for uid in uids if (entry := self._entries.get(uid))]
        pods = sorted(entry.decided[0].key for entry in entries if entry.decided)
        return some(pods, _SHOWN)
