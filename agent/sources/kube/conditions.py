# SPDX-License-Identifier: Apache-2.0
"""Reports in the cluster that no ztunnel is connected here: a condition of the agent's pod, and an Event on the node.

The agent is ready all the same, for ztunnel may be installed after it; but pods of enrolled namespaces do not start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from agent.core.errors import KubeError
from agent.core.model.pods import KubePod, PodTable
from agent.sources.kube.api_client import Client

log = logging.getLogger("sluice.kube")
CONDITION = "sluice.io/ztunnel-connected"
STRATEGIC = "application/strategic-merge-patch+json"
_EVERY = 1.0  # seconds between two checks
_PAUSE = 10.0  # the same, after the API server refused or did not answer
STEADY = 10.0  # seconds without ztunnel until it is reported: not at each of its restarts
_AGAIN = 600.0  # seconds after which the Event is written again: the API server keeps one for an hour
_MISSING = (
    "no ztunnel is connected to the agent: new pods of enrolled namespaces do not start, and captured ones in which "
    "none listens have their connections refused"
)
_COMPONENT = "app.kubernetes.io/component"  # as the chart labels its pods


class ZtunnelCondition:
    """Reports, level-triggered. `report` takes the reason and the message of an Event on the node."""

    def __init__(
        self,
        *,
        client: Client,
        table: PodTable,
        namespace: str,
        connected: Callable[[], bool],
        report: Callable[[str, str], None],
    ) -> None:
        """Takes `namespace`: that of the agent's own pod, "" outside a pod."""
        self._client = client
        self._table = table
        self._namespace = namespace
        self._connected = connected
        self._report = report
        self._away = 0.0
        self._reported: tuple[str, bool] | None = None  # of which pod, and what
        self._failed = False

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_PAUSE if self._failed else _EVERY)

    async def look(self) -> None:
        connected = self._connected()
        self._away = 0.0 if connected else self._away + _EVERY
        if not connected and self._away < STEADY:
            return
        message = "" if connected else _MISSING
        if not connected and (self._away - STEADY) % _AGAIN < _EVERY:
            self._report("ZtunnelMissing", message)
        pod = self._own()
        if pod is None or self._reported == (pod.uid, connected):
            return
        try:
            path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
            await self._client.send("PATCH", path, _patch(pod, message, datetime.now(UTC)), STRATEGIC)
            self._reported = (pod.uid, connected)
            self._failed = False
        except KubeError as error:
            if not self._failed:
                log.warning("condition %s of pod %s: %s", CONDITION, pod.key, error)
            self._failed = True

    def _own(self) -> KubePod | None:
        pods = (pod for uid in self._table.kube_uids() if (pod := self._table.kube(uid)) is not None)
        own = (pod for pod in pods if self._namespace and pod.namespace == self._namespace and not pod.deleting)
        return next((pod for pod in own if pod.labels.get(_COMPONENT) == "agent" and not pod.ended), None)


def _patch(pod: KubePod, missing: str, now: datetime) -> dict[str, Any]:
    """Returns the patch (core/v1, PodCondition); other conditions stay, as they are merged by type."""
    condition = {
        "type": CONDITION,
        "status": "False" if missing else "True",
        "reason": "ZtunnelMissing" if missing else "ZtunnelConnected",
        "message": missing,
        "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {"metadata": {"uid": pod.api_uid}, "status": {"conditions": [condition]}}
