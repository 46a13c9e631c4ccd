# SPDX-License-Identifier: Apache-2.0
"""The ends of a connection and its labels in Istio's TCP metrics, in their order. Pure.

A missing value is `unknown`. The principal of a source is set only where mutual TLS has proven it. An inbound source
that no control plane describes is known by its baggage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from agent.ztunnel.mesh import baggage
from agent.ztunnel.mesh.baggage import Baggage
from agent.ztunnel.mesh.mesh_model import Service, Workload
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.tls.spiffe import SpiffeId, parse

UNKNOWN: Final = "unknown"
_END: Final = (
    "workload",
    "canonical_service",
    "canonical_revision",
    "workload_namespace",
    "principal",
    "app",
    "version",
    "cluster",
)
_SERVICE: Final = ("destination_service", "destination_service_namespace", "destination_service_name")
NAMES: Final = (
    "reporter",
    *(f"source_{name}" for name in _END),
    *_SERVICE,
    *(f"destination_{name}" for name in _END),
    "request_protocol",
    "response_flags",
    "connection_security_policy",
)
LOCALITY_NAMES: Final = ("source_region", "source_zone", "destination_region", "destination_zone")
_FLAGS_AT: Final = NAMES.index("response_flags")


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One end of a connection: what the control plane, baggage and mutual TLS say of it; "" where it is not known.

    `instance` is the name of the pod for the log.
    """

    instance: str = ""
    workload: str = ""
    service: str = ""
    revision: str = ""
    namespace: str = ""
    principal: str = ""
    app: str = ""
    cluster: str = ""
    region: str = ""
    zone: str = ""

    def values(self) -> tuple[str, ...]:
        """Returns the values of the eight labels of an end."""
        return (
            self.workload,
            self.service,
            self.revision,
            self.namespace,
            self.principal,
            self.app,
            self.revision,
            self.cluster,
        )


def party(workload: Workload | None, said: Baggage | None, proven: SpiffeId | None) -> Party | None:
    """Returns one end, by the control plane if it knows the workload, else by baggage; None if nothing is known.

    `proven` is the identity of mutual TLS.
    """
    principal = str(proven) if proven else ""
    if workload is not None:
        return Party(
            instance=workload.name,
            workload=workload.workload_name,
            service=workload.canonical_name,
            revision=workload.canonical_revision,
            namespace=workload.namespace,
            principal=principal,
            app=workload.canonical_name,
            cluster=workload.cluster_id,
            region=workload.locality.region,
            zone=workload.locality.zone,
        )
    if said is None and proven is None:
        return None
    said = said or Baggage()
    return Party(
        instance=said.service_name,
        workload=said.workload_name,
        service=said.service_name,
        revision=said.revision,
        # A peer may say anything in baggage, but its identity is certain.
        namespace=said.namespace or (proven.namespace if proven else ""),
        principal=principal,
        app=said.workload_name,
        cluster=said.cluster_id,
        region=said.region,
        zone=said.zone,
    )


@dataclass(frozen=True, slots=True)
class TrafficLabels:
    """The label values of one connection, in the order of NAMES; `locality` is () if neither end is known."""

    values: tuple[str, ...]
    locality: tuple[str, ...] = ()

    def with_flag(self, flag: ResponseFlag) -> TrafficLabels:
        values = self.values
        return TrafficLabels((*values[:_FLAGS_AT], flag.value, *values[_FLAGS_AT + 1 :]), self.locality)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, value) in the order in which they are shown."""
        return (*zip(NAMES, self.values, strict=True), *zip(LOCALITY_NAMES, self.locality, strict=bool(self.locality)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """A connection as telemetry shows it, from the moment that its way is decided.

    Addresses are texts with ports. `destination_address` is that of the next hop, inbound the one at which the
    connection arrived; `hbone_target` the authority of CONNECT. `asked` is what the client meant: the address that it
    dialled, inbound the host that it named; `target` is where this proxy connects to.
    """

    reporter: Reporter
    source: Party | None
    destination: Party | None
    service: Service | None = None
    mutual_tls: bool
    source_address: str
    destination_address: str
    hbone_target: str = ""
    asked: str = ""
    target: str

    def ending_at(self, said: str, proven: str) -> Parties:
        """Returns the connection behind a gateway: to the workload with this baggage and identity."""
        end = party(None, baggage.parse(said), parse(proven))
        return replace(self, destination=replace(end, instance=end.workload) if end else None)

    def labels(self) -> TrafficLabels:
        """Returns the labels of a connection that has not failed."""
        source = self.source or Party()
        destination = self.destination or Party()
        service = self.service
        values = (
            self.reporter.value,
            *source.values(),
            *((service.hostname, service.namespace, service.name) if service else ("", "", "")),
            *destination.values(),
            "tcp",
            ResponseFlag.NONE.value,
            "mutual_tls" if self.mutual_tls else UNKNOWN,
        )
        locality: tuple[str, ...] = ()
        if self.source or self.destination:
            locality = (source.region, source.zone, destination.region, destination.zone)
        return TrafficLabels(tuple(value or UNKNOWN for value in values), tuple(value or UNKNOWN for value in locality))
