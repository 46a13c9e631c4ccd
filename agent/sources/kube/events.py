# SPDX-License-Identifier: Apache-2.0
"""Writes Kubernetes Events on pods: failures of their capture, for their owners."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agent.core.errors import KubeError
from agent.core.model.pods import Pod, PodTable, without_sandbox
from agent.core.model.status import Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.text import printable
from agent.sources.kube.api_client import Client

log = logging.getLogger("sluice.kube")
EVERY = 300.0  # seconds in which one kind of event is written once per pod; repetitions are counted
_MOST = 1000  # events that wait; more are counted as lost
_LONGEST = 1000  # bytes of a message: the API server takes 1,024 (core/validation/events.go)


@dataclass(slots=True)
class _Kind:
    written: float
    since: int = 0


@dataclass(frozen=True, slots=True)
class About:
    """The object that an event is shown with; a node has no namespace."""

    kind: str
    namespace: str
    name: str
    uid: str

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Events:
    """Writes events; `report` never blocks and never fails."""

    def __init__(self, client: Client, table: PodTable, node: str) -> None:
        self.lost = 0
        self._client = client
        self._table = table
        self._node = node
        self._waiting: asyncio.Queue[tuple[About, str, str]] = asyncio.Queue(_MOST)
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def fought(self, uid: str, message: str) -> None:
        """Reports that another program writes the pod's annotation."""
        if (pod := self._table.get(uid)) is not None:
            self.report(pod, "AnnotationContended", message)

    def report(self, pod: Pod, reason: str, message: str) -> None:
        if (kube := self._table.kube(pod.uid)) is not None:
            self._queue(About("Pod", kube.namespace, kube.name, kube.api_uid), reason, message)

    def report_node(self, reason: str, message: str) -> None:
        """Reports on the node as the kubelet does: in namespace default, with the node's name also as its UID."""
        self._queue(About("Node", "", self._node, self._node), reason, message)

    def _queue(self, about: About, reason: str, message: str) -> None:
        now = time.monotonic()
        kind = self._kinds.get((about.uid, reason))
        if kind is not None and now - kind.written < EVERY:
            kind.since += 1
            return
        more = f" ({kind.since} more in the last {now - kind.written:.0f} s)" if kind and kind.since else ""
        self._kinds[about.uid, reason] = _Kind(now)
        if len(self._kinds) > _MOST:
            self._kinds = {key: one for key, one in self._kinds.items() if now - one.written < EVERY}
        try:
            self._waiting.put_nowait((about, reason, message.encode()[:_LONGEST].decode(errors="ignore") + more))
        except asyncio.QueueFull:
            self.lost += 1

    async def run(self) -> None:
        """Runs until cancelled. A failed event is counted: the log and the metrics have it anyway."""
        while True:
            about, reason, message = await self._waiting.get()
            try:
                path = f"/api/v1/namespaces/{about.namespace or 'default'}/events"
                await self._client.send("POST", path, event(about, reason, message, self._node, datetime.now(UTC)))
            except KubeError as error:
                self.lost += 1
                log.warning("%s %s: event %s not written: %s", about.kind.lower(), about.key, reason, error)


class EventJournal:
    """The reconciler's journal for pods' owners: failures and repairs as events."""

    def __init__(self, events: Events, passed: Callable[[str], None]) -> None:
        """Takes `passed`, which is called with the UID of each pod that had a pass."""
        self._events = events
        self._passed = passed

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        if cause:
            what = "; ".join(differences[:3])
            self._events.report(
                pod, "CaptureRepaired", f"{cause} changed {layer}, repaired after {seconds * 1e3:.0f} ms: {what}"
            )

    def failed(self, pod: Pod, error: Exception) -> None:
        if not without_sandbox(pod, error):
            self._events.report(pod, "CaptureFailed", str(error))

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        self._events.report(
            pod, "CaptureContended", f"{cause} repeatedly reverts the rules of capture; {'; '.join(remarks)}"
        )

    def probed(self, pod: Pod, result: ProbeResult) -> None:
        if result.verdict is not ProbeVerdict.OK:
            self._events.report(pod, "CaptureProbeFailed", str(result))

    def stalled(self, pod: Pod, *, over: bool) -> None:
        """Does nothing: it is no failure of the capture, and it concerns the node rather than the pod."""

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        self._passed(pod.uid)


def event(about: About, reason: str, message: str, node: str, now: datetime) -> dict[str, Any]:
    """Returns the Event that `kubectl describe pod` shows (core/v1, Event)."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{about.name[:200]}.{time.time_ns():x}", "namespace": about.namespace or "default"},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": about.kind,
            **({"namespace": about.namespace} if about.namespace else {}),
            "name": about.name,
            "uid": about.uid,
        },
        "type": "Warning",
        "reason": reason,
        "message": printable(message),  # kubectl prints it as it is
        "source": {"component": "sluice", "host": node},
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
