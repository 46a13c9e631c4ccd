# SPDX-License-Identifier: Apache-2.0
"""A connection with the names of both its ends: one record, as it is logged, listed and followed. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.core.model.pods import Pod
from agent.core.text import utc
from agent.flows.identity import Identities, pod_workload
from agent.flows.outcome import outcome
from agent.flows.record import Connection, Direction, Fate


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRecord:
    """A connection with names. `pod`, `namespace` and `workload` are of the end that saw it; "" is unknown."""

    connection: Connection
    node: str = ""
    pod: str = ""
    namespace: str = ""
    workload: str = ""
    remote_workload: str = ""
    remote_namespace: str = ""
    remote_service: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns its JSON form. `time` is its end, or its begin while it lives: ISO 8601 in UTC with milliseconds."""
        moment = self.connection.opened if self.connection.closed is None else self.connection.closed
        return {
            "time": utc(moment, "milliseconds"),
            "node": self.node,
            "pod": self.pod,
            "namespace": self.namespace,
            "workload": self.workload,
            "remote_workload": self.remote_workload,
            "remote_namespace": self.remote_namespace,
            "remote_service": self.remote_service,
            **self.connection.as_dict(),
            "outcome": outcome(self.connection).value,
        }


def named(connection: Connection, pod: Pod | None, identities: Identities, node: str) -> ResolvedRecord:
    """Adds names to a connection. `pod` owns the socket; None if it has been forgotten."""
    remote, peer = connection.remote, connection.peer
    service = identities.service(*remote) if connection.direction is Direction.OUTBOUND else None
    workload = identities.workload(remote[0])
    if workload is None and peer and connection.fate is not Fate.CAPTURED:  # of a captured one that is ztunnel
        workload = identities.workload(peer[0])
    return ResolvedRecord(
        connection=connection,
        node=node,
        pod=pod.name if pod else "",
        namespace=pod.namespace if pod else "",
        workload=pod_workload(pod, identities.cluster).name if pod else "",
        remote_workload=workload.name if workload else "",
        remote_namespace=workload.namespace if workload else service.namespace if service else "",
        remote_service=service.name if service else "",
    )
