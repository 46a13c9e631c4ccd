# SPDX-License-Identifier: Apache-2.0
"""Asks the mesh for a pod's query, and keeps one that a resolver was asked: its deadline, its count and its record."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from agent.ztunnel.dns import dnsmessage
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.pod_context import PodContext, now

if TYPE_CHECKING:
    from agent.ztunnel.telemetry.dns_metrics import DnsLabels


class MeshReply(NamedTuple):
    """The reply of the mesh to a query; `answer` is None for a query of the resolver."""

    answer: bytes | None
    labels: DnsLabels | None = None
    error: str = ""


def ask_mesh(pod: PodContext, message: bytes, question: bytes, protocol: str) -> MeshReply:
    """Counts the query and returns the mesh's reply; `question` is that of dnsmessage."""
    engine = pod.engine
    if engine.mesh_names is None or engine.traffic is None or not question:
        return MeshReply(None)
    client = engine.mesh_names.client(pod.add)
    labels = engine.traffic.dns.labels(question, protocol, client)
    if client is None:
        reply = MeshReply(dnsmessage.failure(question), labels, "the mesh does not know the pod")
    else:
        reply = MeshReply(engine.mesh_names.answer(client, message, question, udp=protocol == "udp"), labels)
    engine.traffic.dns.asked(labels, forwarded=reply.answer is None)
    return reply


class QueryUser(Protocol):
    """A flow or connection with queries."""

    def unanswered(self, query: PendingQuery) -> None:
        """Answers with SERVFAIL, because the resolver is silent."""


class PendingQuery:
    """A query without an answer; `question` is the message up to the end of its question."""

    __slots__ = ("_client", "_labels", "_pod", "_size", "_target", "_user", "began", "question")

    def __init__(
        self, pod: PodContext, user: QueryUser, question: bytes, labels: DnsLabels | None, *, client: Address,
        target: Address, size: int,
    ) -> None:  # fmt: skip
        """Starts its deadline; `settle` ends it."""
        self._pod = pod
        self._user = user
        self._client = client
        self._target = target
        self.question = question
        self._size = size
        self._labels = labels
        self.began = now()
        pod.engine.queries.add(self)

    def expire(self) -> None:
        self._user.unanswered(self)

    def settle(self, received: int, close: str, error: str = "", *, usable: bool = False) -> None:
        """Records the end. `usable`: the resolver has answered, even if the name does not exist."""
        self._pod.engine.queries.settle(self)
        traffic = self._pod.engine.traffic
        if traffic is not None and self._labels is not None:
            traffic.dns.settled(self._labels, time.monotonic() - self.began[1], failed=not usable)
        self._pod.record(
            "dns", "outbound", self.began, self._client, self._target, self._size, received, close, error
        )  # fmt: skip
