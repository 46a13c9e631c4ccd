"""The canaries under way: whether the node's probes reach newly enrolled pods is seen beside the passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.reconciler.enrolment import Enrolled
from agent.reconciler.interfaces import ProbeCanary


class Canaries:
    """One task per pod that is due."""

    def __init__(self, canary: ProbeCanary) -> None:
        self._canary = canary
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._first = set[str]()  # just captured, and ztunnel has not been seen there yet

    def captured(self, uid: str, *, first: bool) -> None:
        """The pod has its rules. Its first probe waits for ztunnel, which may be much later."""
        if first:
            self._first.add(uid)

    def enrolled(self, pod: Pod, found: Enrolled, told: Callable[[ProbeResult], None]) -> None:
        """ztunnel has the pod, too; `told` is called with the probe's result."""
        if pod.uid in self._first:
            self._first.discard(pod.uid)
            self._canary.enrolled(pod.uid)
        if self._canary.due(pod.uid) and pod.uid not in self._tasks:
            task = asyncio.create_task(self._look(pod, found, told), name=f"probe {pod.uid}")
            self._tasks[pod.uid] = task
            task.add_done_callback(lambda _: self._tasks.pop(pod.uid, None))

    def due(self, uid: str) -> bool:
        return self._canary.due(uid)

    def forget(self, uid: str) -> None:
        self._first.discard(uid)
        self._canary.forget(uid)

    def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    async def _look(self, pod: Pod, found: Enrolled, told: Callable[[ProbeResult], None]) -> None:
        addresses = pod.addresses or found.addresses
        try:
            finding = await self._canary.probe(addresses, found.target, ipv6=found.want.ipv6)
        except SluiceError:
            return  # the pod has gone, or its next pass will tell
        self._canary.done(pod.uid, finding)
        if finding.verdict is not ProbeVerdict.NO_LISTENER:
            told(finding)
