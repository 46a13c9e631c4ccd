# SPDX-License-Identifier: Apache-2.0
"""Workloads, services and policies: frozen values, as the control plane or a local file describes them. Pure.

The names of fields are those of Istio's API (workload.proto, authorization.proto) in Python's spelling. An address is
always in the canonical text form of `ipaddress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from ipaddress import IPv4Network, IPv6Network

from agent.ztunnel.tls.spiffe import SpiffeId

Ports = Mapping[int, int]  # service port to target port, which is 0 for a named one
IpNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, order=True)
class NetworkAddress:
    """An address in a network; `network` is "" where there is only one."""

    network: str
    ip: str

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


@dataclass(frozen=True, slots=True)
class NamespacedHostname:
    """The name of a service or of a workload with a host name."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class Gateway:
    """A waypoint or a gateway of another network."""

    destination: NetworkAddress | NamespacedHostname
    hbone_port: int


@dataclass(frozen=True, slots=True)
class Locality:
    region: str = ""
    zone: str = ""
    subzone: str = ""


class WorkloadProtocol(StrEnum):
    """Protocol to a workload."""

    TCP = "TCP"
    HBONE = "HBONE"


class TunnelProtocol(StrEnum):
    """Header in front of the bytes that an application tunnel gets."""

    NONE = "NONE"
    PROXY = "PROXY"


@dataclass(frozen=True, slots=True)
class ApplicationTunnel:
    """A workload that takes connections for others, as a waypoint does. `port` 0 leaves the port as it is."""

    protocol: TunnelProtocol
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A pod, or another instance of an application. `services` maps namespace/hostname to its ports."""

    uid: str
    name: str
    namespace: str
    service_account: str = ""
    trust_domain: str = ""
    addresses: tuple[str, ...] = ()
    hostname: str = ""
    network: str = ""
    host_network: bool = False
    protocol: WorkloadProtocol = WorkloadProtocol.TCP
    node: str = ""
    cluster_id: str = ""
    workload_name: str = ""
    workload_type: str = ""  # deployment, cronjob, pod or job
    canonical_name: str = ""
    canonical_revision: str = ""
    waypoint: Gateway | None = None
    network_gateway: Gateway | None = None
    native_tunnel: bool = False
    application_tunnel: ApplicationTunnel | None = None
    authorization_policies: tuple[str, ...] = ()  # namespace/name
    healthy: bool = True
    locality: Locality = Locality()
    capacity: int = 1
    services: Mapping[str, Ports] = field(default_factory=dict)

    @property
    def identity(self) -> SpiffeId:
        """Returns who the workload is in mutual TLS."""
        return SpiffeId(self.trust_domain, self.namespace, self.service_account)


class BalancingMode(StrEnum):
    """Strictness of the scopes of a load balancer."""

    STANDARD = "Standard"  # the scopes do not matter
    STRICT = "Strict"  # every scope must match
    FAILOVER = "Failover"  # the best match is taken
    PASSTHROUGH = "Passthrough"  # the original destination is kept


class BalancingScope(StrEnum):
    """Locality that a client and an endpoint have in common."""

    REGION = "Region"
    ZONE = "Zone"
    SUBZONE = "Subzone"
    NODE = "Node"
    CLUSTER = "Cluster"
    NETWORK = "Network"


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    scopes: tuple[BalancingScope, ...]
    mode: BalancingMode
    unhealthy_too: bool = False


class IpFamilies(Enum):
    """The families of a service."""

    DUAL = (4, 6)
    IPV4 = (4,)
    IPV6 = (6,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service. Its endpoints are in the workloads (see mesh_store)."""

    name: str
    namespace: str
    hostname: str
    addresses: tuple[NetworkAddress, ...] = ()
    ranges: tuple[tuple[str, IpNetwork], ...] = ()  # (network, addresses)
    ports: Ports = field(default_factory=dict)
    subject_alt_names: tuple[str, ...] = ()
    waypoint: Gateway | None = None
    weighted_waypoints: tuple[tuple[Gateway, int], ...] = ()
    load_balancer: LoadBalancer | None = None
    ip_families: IpFamilies | None = None
    canonical: bool = False
    namespace_only: bool = False  # visible to clients of its own namespace alone

    @property
    def key(self) -> str:
        """Returns namespace/hostname."""
        return f"{self.namespace}/{self.hostname}"

    def visible_to(self, namespace: str) -> bool:
        return not self.namespace_only or namespace == self.namespace


class StringRule(StrEnum):
    """Kind of comparison with a pattern."""

    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    rule: StringRule
    pattern: str = ""

    def matches(self, value: str) -> bool:
        match self.rule:
            case StringRule.EXACT:
                return value == self.pattern
            case StringRule.PREFIX:
                return value.startswith(self.pattern)
            case StringRule.SUFFIX:
                return value.endswith(self.pattern)
            case StringRule.PRESENCE:
                return bool(value)


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions on a connection: each field that is not empty needs one match. All are lists of alternatives."""

    namespaces: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()  # without spiffe://
    source_ips: tuple[IpNetwork, ...] = ()
    destination_ips: tuple[IpNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()


NO_CONDITIONS = Conditions()


@dataclass(frozen=True, slots=True)
class AuthorizationMatch:
    """Conditions that must hold, and conditions of which none may hold."""

    required: Conditions = NO_CONDITIONS
    forbidden: Conditions = NO_CONDITIONS

    @property
    def empty(self) -> bool:
        return self.required == self.forbidden == NO_CONDITIONS


class AuthorizationScope(StrEnum):
    GLOBAL = "Global"
    NAMESPACE = "Namespace"
    WORKLOAD = "WorkloadSelector"


class AuthorizationAction(StrEnum):
    ALLOW = "Allow"
    DENY = "Deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorization:
    """A policy. Rules are alternatives, all clauses of a rule must match, the matches of a clause are alternatives."""

    name: str
    namespace: str
    scope: AuthorizationScope
    action: AuthorizationAction
    rules: tuple[tuple[tuple[AuthorizationMatch, ...], ...], ...] = ()
    dry_run: bool = False

    @property
    def key(self) -> str:
        """Returns namespace/name."""
        return f"{self.namespace}/{self.name}"
