# SPDX-License-Identifier: Apache-2.0
"""Runs the canary's probes of newly enrolled pods in tasks of their own, so that no pass waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.reconciler.enrolment import Enrolled
from agent.reconciler.interfaces import ProbeCanary


class Canaries:
    """Runs one task per pod that is due. Without a `canary` no pod is ever due."""

    def __init__(self, canary: ProbeCanary | None) -> None:
        self._canary = canary
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._first = set[str]()  # just captured; ztunnel has not been seen there yet

    def captured(self, uid: str, *, first: bool) -> None:
        """Notes that the pod has its rules. Its `first` probe waits for ztunnel, which may be much later."""
        if first and self._canary:
            self._first.add(uid)

    def enrolled(self, pod: Pod, enrolled: Enrolled, report: Callable[[ProbeResult], None]) -> None:
        """Starts the pod's probe if it is due, now that ztunnel has the pod; `report` receives the result."""
        if self._canary is None:
            return
        if pod.uid in self._first:
            self._first.discard(pod.uid)
            self._canary.enrolled(pod.uid)
        if self._canary.due(pod.uid) and pod.uid not in self._tasks:
            task = asyncio.create_task(self._probe(self._canary, pod, enrolled, report), name=f"probe {pod.uid}")
            self._tasks[pod.uid] = task
            task.add_done_callback(lambda _: self._tasks.pop(pod.uid, None))

    def due(self, uid: str) -> bool:
        return self._canary is not None and self._canary.due(uid)

    def forget(self, uid: str) -> None:
        self._first.discard(uid)
        if self._canary:
            self._canary.forget(uid)

    def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    async def _probe(
        self, canary: ProbeCanary, pod: Pod, enrolled: Enrolled, report: Callable[[ProbeResult], None]
    ) -> None:
        addresses = pod.addresses or enrolled.addresses
        try:
            result = await canary.probe(addresses, enrolled.target, ipv6=enrolled.want.ipv6)
        except SluiceError:
            return  # the pod has gone, or its next pass reports why
        canary.done(pod.uid, result)
        if result.verdict is not ProbeVerdict.NO_LISTENER:
            report(result)
