# SPDX-License-Identifier: Apache-2.0
"""Answers a pod's queries for names of the mesh; a bounded cache spares the work for a name that is asked often."""

from __future__ import annotations

import random
from typing import Final

from agent.zds.messages import Add
from agent.ztunnel.dns import dns_answers
from agent.ztunnel.dns.dns_answers import Query
from agent.ztunnel.mesh.mesh_model import Workload
from agent.ztunnel.mesh.mesh_store import MeshStore

MOST: Final = 4096  # names that are known not to be of the mesh


class MeshNames:
    """Implements pod_context.MeshNames. For one thread."""

    def __init__(self, store: MeshStore, domain: str) -> None:
        """Takes the domain of the cluster."""
        self._store = store
        self._domain = domain
        self._foreign: dict[tuple[str, tuple[str, ...]], None] = {}

    def answer(self, pod: Add, datagram: bytes) -> bytes | None:
        """Returns the answer; None for the resolver that the pod asked."""
        asked = dns_answers.query(datagram)
        client = self._store.workload_of_pod(pod.namespace, pod.name, pod.service_account)
        if asked is None or client is None:
            return None
        key = (client.namespace, asked.name)
        if key in self._foreign:
            return None
        found = dns_answers.answer(self._store, client, asked, self._domain, random.shuffle, udp=True)
        if found is None:
            self._remember(asked, client)
        return found

    def _remember(self, asked: Query, client: Workload) -> None:
        if len(self._foreign) >= MOST:
            self._foreign.clear()
        self._foreign[client.namespace, asked.name] = None

    def changed(self) -> None:
        """Forgets what the previous mesh did not have."""
        self._foreign.clear()
