# SPDX-License-Identifier: Apache-2.0
"""Answers a pod's queries for names of the mesh.

Nothing is cached: a name that is not of the mesh costs 10 to 40 us, less than to forward its query.
"""

from __future__ import annotations

import random

from agent.zds.messages import Add
from agent.ztunnel.dns import dns_answers
from agent.ztunnel.mesh.mesh_store import MeshStore


class MeshNames:
    """Implements pod_context.MeshNames. For one thread."""

    def __init__(self, store: MeshStore, domain: str) -> None:
        """Takes the domain of the cluster."""
        self._store = store
        self._domain = domain

    def answer(self, pod: Add, datagram: bytes) -> bytes | None:
        """Returns the answer; None for the resolver that the pod asked."""
        asked = dns_answers.query(datagram)
        client = self._store.workload_of_pod(pod.namespace, pod.name, pod.service_account)
        if asked is None or client is None:
            return None
        return dns_answers.answer(self._store, client, asked, self._domain, random.shuffle, udp=True)
