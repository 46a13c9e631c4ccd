"""Keeps each pod's annotation ambient.istio.io/redirection as its state is: istiod decides by it how pods are reached.

Level-triggered: what the annotation is, as last seen in the API, against what it has to be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from agent.core import names
from agent.core.errors import KubeError
from agent.core.pods import KubePod, PodTable
from agent.core.schedule import Schedule
from agent.core.status import State

log = logging.getLogger("sluice.kube")
_AT_ONCE = 4  # patches under way
MERGE_PATCH = "application/merge-patch+json"


class Sending(Protocol):
    """The API server, as far as something is written there."""

    async def send(self, method: str, path: str, body: Any, content_type: str = ...) -> Mapping[str, Any]: ...


class Annotator:
    """One pod's failure (it may be gone, or the API) is tried again with growing pauses, and stops no other."""

    def __init__(
        self,
        client: Sending,
        table: PodTable,
        state: Callable[[str], State],
        captured: Callable[[str], bool],
        period: float,
        random: Callable[[], float],
    ) -> None:
        """`period`: seconds after which a pod is tried again that the API server did not know, or not as the same."""
        self._client, self._table, self._state, self._captured = client, table, state, captured
        self._schedule, self._due = Schedule(period, random), asyncio.Event()

    def look(self, uid: str) -> None:
        """The pod's state or its annotation may be another one by now."""
        if self._due_for(uid) is not None:
            self._schedule.wake(uid, time.monotonic())
            self._due.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            free = asyncio.Semaphore(_AT_ONCE)
            while True:
                self._due.clear()
                for uid in self._schedule.take(time.monotonic(), 64):
                    tasks.create_task(self._one(uid, free))
                due = self._schedule.next_due()
                try:
                    async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                        await self._due.wait()
                except TimeoutError:
                    continue

    async def _one(self, uid: str, free: asyncio.Semaphore) -> None:
        ok = False
        try:
            async with free:
                ok = await self._settle(uid)
        finally:
            self._schedule.ended(uid, time.monotonic(), ok=ok)
            if self._due_for(uid) is None:
                self._schedule.drop(uid)
            self._due.set()

    async def _settle(self, uid: str) -> bool:
        if (due := self._due_for(uid)) is None:
            return True
        pod, want = due
        try:
            await self._client.send("PATCH", _path(pod), _patch(pod, want), MERGE_PATCH)
        except KubeError as error:
            if error.status in (404, 409):  # it is gone, or another pod has its name by now
                return True
            log.warning("pod %s: annotation %s not set to %r: %s", pod.key, names.REDIRECTION, want, error)
            return False
        now = self._table.kube(uid)
        if now is not None:  # what the watch will tell, so that nothing is written twice
            others = {key: text for key, text in now.annotations.items() if key != names.REDIRECTION}
            self._table.know(replace(now, annotations={**others, names.REDIRECTION: want} if want else others))
        return True

    def _due_for(self, uid: str) -> tuple[KubePod, str] | None:
        """The pod and what its annotation has to become; None when it is that."""
        pod, want = self._table.kube(uid), self._wanted(uid)
        if pod is None or want is None or want == pod.annotations.get(names.REDIRECTION, ""):
            return None
        return pod, want

    def _wanted(self, uid: str) -> str | None:
        """ "" for no annotation; None while nothing is known yet."""
        match self._state(uid):
            case State.ENABLED:
                return "enabled"
            case State.PENDING:
                return "pending"
            case State.FAILED:
                return "pending" if self._captured(uid) else ""
            case State.EXCLUDED:
                return ""
        return None


def _path(pod: KubePod) -> str:
    return f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"


def _patch(pod: KubePod, want: str) -> dict[str, Any]:
    """The object's UID is a precondition: a pod of a StatefulSet comes again under its name."""
    return {"metadata": {"uid": pod.api_uid, "annotations": {names.REDIRECTION: want or None}}}
