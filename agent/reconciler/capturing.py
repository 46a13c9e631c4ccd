# SPDX-License-Identifier: Apache-2.0
"""Capture of one pod: apply the chosen layers, wait for packets under way, then clear the retired layers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent.backends.base import PodLayer
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.kernel.grace import await_packets
from agent.reconciler.enrolment import Enrolled, Enrolment
from agent.reconciler.pod_state import BELIEVED, PodState
from agent.reconciler.workers import Workers


class Capturing:
    """Captures pods step by step; belongs to the event loop's thread.

    One wait in the kernel serves all pods that need it, and holds no worker.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        workers: Workers,
        retired: tuple[PodLayer, ...],
        wait: Callable[[], None] | None = None,
    ) -> None:
        """Layers in `retired` may still hold rules. `wait` replaces kernel.grace.await_packets."""
        self._enrolment = enrolment
        self._workers = workers
        self._retired = retired
        self._wait = wait or await_packets
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None  # has not begun, so it serves every pod that asks now

    async def step(self, pod: Pod, entry: PodState, redirect: Redirect, *, first: bool) -> Enrolled:
        """Applies `redirect` and clears retired layers. Raises SluiceError; the next pass goes on from there.

        `first`: no rules capture the pod yet.
        """
        retired = () if time.monotonic() - entry.cleaned < BELIEVED else self._retired
        enrol = self._enrolment.enrol
        retire = self._enrolment.retire
        enrolled = await entry.work(self._workers, lambda: enrol(pod, redirect, retired, first=first))
        if enrolled.to_retire:
            await self._passed()
            applied = enrolled
            enrolled = await entry.work(self._workers, lambda: retire(pod, applied))
        if retired:
            entry.cleaned = time.monotonic()
        return enrolled

    async def _passed(self) -> None:
        """Returns when a wait has ended that began after this call. Raises KernelError."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running), name="grace period")
        await asyncio.shield(self._next)

    async def _after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        self._running = self._next
        self._next = None
        await asyncio.to_thread(self._wait)
