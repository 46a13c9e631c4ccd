# SPDX-License-Identifier: Apache-2.0
"""Answers a pod's queries for names of the mesh.

A resolver library asks for each name with all of its search domains. To find that the mesh has none of them costs about
as much as to forward them, so the results are kept until a service changes.
"""

from __future__ import annotations

import random
from typing import Final

from agent.zds.messages import Add
from agent.ztunnel.dns import dns_answers
from agent.ztunnel.dns.dns_answers import Match
from agent.ztunnel.mesh.mesh_model import Workload
from agent.ztunnel.mesh.mesh_store import MeshStore

MOST_KEPT: Final = 4096  # names; one more, and all are looked up again


class MeshNames:
    """Implements pod_context.MeshNames. For one thread."""

    def __init__(self, store: MeshStore, domain: str) -> None:
        """Takes the domain of the cluster."""
        self._store = store
        self._domain = domain
        self._found: dict[tuple[str, bytes], Match | None] = {}  # by the client's namespace and the name
        self._found_at = 0  # the version of the services

    def client(self, pod: Add) -> Workload | None:
        return self._store.workload_of_pod(pod.namespace, pod.name, pod.service_account)

    def answer(self, client: Workload, message: bytes, question: bytes, *, udp: bool) -> bytes | None:
        asked = dns_answers.query(message, question)
        match = self._find(client.namespace, asked.name) if asked else None
        if asked is None or match is None:
            return None
        return dns_answers.answer(self._store, client, asked, match, random.shuffle, udp=udp)

    def _find(self, namespace: str, name: bytes) -> Match | None:
        if self._found_at != self._store.services_version or len(self._found) >= MOST_KEPT:
            self._found.clear()
            self._found_at = self._store.services_version
        key = namespace, name
        if key not in self._found:
            self._found[key] = dns_answers.find(self._store, namespace, name, self._domain)
        return self._found[key]
