# SPDX-License-Identifier: Apache-2.0
"""Holds a CNI ADD until the pod's labels are known, which are in the API alone."""

from __future__ import annotations

import asyncio
import logging

from agent.core.errors import KubeError
from agent.core.model.pods import KubePod, Pod, PodTable
from agent.core.policy.decide import enrols_namespace, exempt
from agent.core.settings import Settings
from agent.sources.kube import objects
from agent.sources.kube.api_client import Client

log = logging.getLogger("sluice.kube")
_WATCH = 0.2  # seconds for the watch to deliver a pod that the kubelet knows already


class Admission:
    """Fails closed: a pod that is or may be enrolled does not start before that is known."""

    def __init__(self, client: Client, table: PodTable, settings: Settings) -> None:
        self._client = client
        self._table = table
        self._settings = settings

    async def admit(self, pod: Pod) -> None:
        """Returns when the table has all that the decision needs, or when it is no matter.

        Raises KubeError: the pod may have to be captured, and what the API says of it cannot be had.
        """
        if exempt(pod.namespace, pod.name, self._settings) or await self._arrived(pod):
            return
        try:
            await self._look_up(pod)
        except KubeError as error:
            labels = self._table.namespace_labels(pod.namespace)
            by_namespace = self._settings.offline_pods == "by-namespace"
            if by_namespace and labels is not None and not enrols_namespace(labels, self._settings):
                log.warning(
                    "pod %s passes, as its namespace is not enrolled, but was not looked up: %s", pod.key, error
                )
                return
            raise KubeError(f"cannot decide whether to capture it: {error}", error.status, error.reason) from None

    def _known(self, pod: Pod) -> bool:
        there = self._table.kube(pod.uid) is not None
        return there and self._table.namespace_labels(pod.namespace) is not None

    async def _arrived(self, pod: Pod) -> bool:
        for _ in range(10):
            if self._known(pod):
                return True
            await asyncio.sleep(_WATCH / 10)
        return self._known(pod)

    async def _look_up(self, pod: Pod) -> None:
        base = f"/api/v1/namespaces/{pod.namespace}"
        if self._table.namespace_labels(pod.namespace) is None:
            namespace = objects.namespace(await self._client.get(base))
            if namespace is not None:
                self._table.know_namespace(namespace)
        if self._table.kube(pod.uid) is None:
            current = objects.pod(await self._client.get(f"{base}/pods/{pod.name}"))
            if current is None or not _is(current, pod):
                raise KubeError("the API server has another pod of that name", 404, "NotFound")
            self._table.know(current)


def _is(current: KubePod, pod: Pod) -> bool:
    return current.uid == pod.uid and current.key == pod.key
