# SPDX-License-Identifier: Apache-2.0
"""Keeps each pod's annotation ambient.istio.io/redirection as its state is: istiod decides by it how pods are reached.

Level-triggered: compares the annotation, as last seen in the API, with the desired one. With `enabled` all nodes send
HBONE to the pod, otherwise plain text; so it is written at once and taken back late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from agent.core import names
from agent.core.errors import KubeError
from agent.core.model.pods import KubePod, PodTable
from agent.core.model.status import State
from agent.core.policy.contention import Contention
from agent.core.policy.schedule import Schedule
from agent.sources.kube import objects
from agent.sources.kube.api_client import Client

log = logging.getLogger("sluice.kube")
_AT_ONCE = 4  # patches under way
# Seconds that `enabled` stays while a pod's rules or ztunnel's listeners are missing. Plain text would be refused, too,
# and would still be sent some seconds after ztunnel is back.
HOLD = 60.0
ENABLED, PENDING = "enabled", "pending"
MERGE_PATCH = "application/merge-patch+json"


@dataclass(slots=True)
class _Past:
    """The history of one pod's annotation: since when `enabled` is no longer true, what we wrote, who else writes."""

    since: float | None = None
    written: str | None = None
    fight: Contention = field(default_factory=lambda: Contention(free=2, window=60.0, first=30.0, longest=1800.0))


class Annotator:
    """One pod's failure (it may be gone, or the API) is tried again with growing pauses, and stops no other."""

    def __init__(
        self,
        *,
        client: Client,
        table: PodTable,
        state: Callable[[str], State],
        captured: Callable[[str], bool],
        period: float,
        random: Callable[[], float],
        known: Callable[[], bool],
        others: Callable[[], str],
        fought: Callable[[str, str], None],
        hold: float = HOLD,
    ) -> None:
        """Takes `period`: seconds until a pod is tried again that the API server did not know, or not as the same.

        Nothing is written until `known()`: pods and namespaces are known, and a ztunnel has been connected. `others`
        says how another agent of the mesh shows on this node, or ""; it may block. `fought` is called with a pod's UID
        and a line when another program keeps changing the annotation.
        """
        self._client = client
        self._table = table
        self._state = state
        self._captured = captured
        self._known = known
        self._others = others
        self._fought = fought
        self._hold = hold
        self._schedule = Schedule(period, random)
        self._due = asyncio.Event()
        self._past: dict[str, _Past] = {}
        self._yields = ""

    @property
    def error(self) -> str:
        """Names annotations that are wrong because another program writes them; "" without any."""
        now = time.monotonic()
        fought = [
            pod.key for uid, past in self._past.items() if past.fight.pause(now) and (pod := self._table.kube(uid))
        ]
        if fought:
            return (
                f"annotation {names.REDIRECTION}: another program keeps changing it, on {', '.join(sorted(fought)[:3])}"
            )
        return self._yields

    def look(self, uid: str) -> None:
        """Schedules a check of the pod's annotation."""
        if (due := self._due_for(uid)) is not None:
            self._schedule.wake(uid, self._when(uid, due[0]))
            self._due.set()
        elif uid in self._past:
            self._past[uid].since = None

    async def run(self) -> None:
        """Runs until cancelled."""
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
        if (at := self._when(uid, pod)) > time.monotonic():
            self._schedule.wake(uid, at)
            return True
        if _is(pod) and want != ENABLED and await self._yielding():
            return False
        try:
            await self._client.send("PATCH", _path(pod), _patch(pod, want), MERGE_PATCH)
        except KubeError as error:
            if error.status in (404, 409):  # it is gone, or another pod has its name by now
                return True
            log.warning("pod %s: annotation %s not set to %r: %s", pod.key, names.REDIRECTION, want, error)
            return False
        self._wrote(uid, pod, want)
        now = self._table.kube(uid)
        if now is not None:  # known before the watch reports it, so that it is not written twice
            others = {key: text for key, text in now.annotations.items() if key != names.REDIRECTION}
            self._table.know(replace(now, annotations={**others, names.REDIRECTION: want} if want else others))
        return True

    async def _yielding(self) -> bool:
        """Returns whether another agent runs here that may have written the annotation."""
        other = await asyncio.to_thread(self._others)
        warning = f"annotation {names.REDIRECTION}: left as it is while istio-cni's agent runs here, too ({other})"
        if other and not self._yields:
            log.warning("%s", warning)
        self._yields = warning if other else ""
        return bool(other)

    def _wrote(self, uid: str, pod: KubePod, want: str) -> None:
        if (past := self._past.get(uid)) is None:  # the pod went meanwhile
            return
        if past.written == want and past.fight.repaired(time.monotonic()):
            pause = past.fight.pause(time.monotonic())
            warning = (
                f"another program keeps setting {names.REDIRECTION} to {_is(pod)!r}; {want!r} follows in {pause:.0f} s"
            )
            log.warning("pod %s: %s", pod.key, warning)
            self._fought(uid, warning)
        past.written = want

    def _when(self, uid: str, pod: KubePod) -> float:
        """Returns when to write the annotation, on the monotonic clock."""
        now = time.monotonic()
        if uid not in self._past:  # a good moment to drop the pods that are gone
            self._past = {one: past for one, past in self._past.items() if self._table.kube(one)}
            self._past[uid] = _Past()
        past = self._past[uid]
        at = now + past.fight.pause(now)
        if _is(pod) != ENABLED or pod.ended or self._freed(uid, past):
            past.since = None
            return at
        past.since = now if past.since is None else past.since
        return max(at, past.since + self._hold)

    def _freed(self, uid: str, past: _Past) -> bool:
        """Returns True if the pod's rules were removed. A failed pod may still have rules of an earlier agent."""
        if self._state(uid) is State.EXCLUDED:
            return True
        return self._state(uid) is State.FAILED and past.written == ENABLED and not self._captured(uid)

    def _due_for(self, uid: str) -> tuple[KubePod, str] | None:
        """Returns the pod and its desired annotation; None if it has that."""
        pod = self._table.kube(uid)
        want = self._wanted(uid)
        if pod is None or want is None or want == _is(pod) or not self._known():
            return None
        return pod, want

    def _wanted(self, uid: str) -> str | None:
        """Returns the value, "" for no annotation; None while nothing is known yet."""
        if (pod := self._table.kube(uid)) is not None and pod.ended:
            return ""  # its sandbox may be gone before the API server says so, or after
        match self._state(uid):
            case State.ENABLED | State.STALLED:  # of the latter ztunnel has the pod, and listens there
                return ENABLED
            case State.PENDING:
                return PENDING
            case State.FAILED:
                return PENDING if self._captured(uid) else ""
            case State.EXCLUDED:
                return ""
        return None


async def take_back(client: Client, node: str, keep: Collection[str]) -> list[str]:
    """Removes the annotation from the node's pods except those with UIDs in `keep`. Returns the pods' names.

    Raises KubeError; what was removed until then stays removed, so it may be called again.
    """
    done = list[str]()
    query = {"fieldSelector": f"spec.nodeName={node}", "limit": "500"}
    while True:
        page = await client.get("/api/v1/pods", query)
        for pod in filter(None, map(objects.pod, page.get("items") or ())):
            if not _is(pod) or pod.uid in keep:
                continue
            try:
                await client.send("PATCH", _path(pod), _patch(pod, ""), MERGE_PATCH)
                done.append(pod.key)
            except KubeError as error:
                if error.status not in (404, 409):  # it is gone, or another pod has its name by now
                    raise
        if not (following := (page.get("metadata") or {}).get("continue")):
            return done
        query["continue"] = following


def _is(pod: KubePod) -> str:
    return pod.annotations.get(names.REDIRECTION, "")


def _path(pod: KubePod) -> str:
    return f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"


def _patch(pod: KubePod, want: str) -> dict[str, Any]:
    """Returns a patch with the object's UID as a precondition: a pod of a StatefulSet comes again under its name."""
    return {"metadata": {"uid": pod.api_uid, "annotations": {names.REDIRECTION: want or None}}}
