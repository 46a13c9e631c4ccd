# SPDX-License-Identifier: Apache-2.0
"""Istio's resources as istiod sends them (istio.workload.Address, istio.security.Authorization). Pure.

Field numbers are those of workload.proto and authorization.proto. A resource that cannot be used raises ProtocolError
with the reason, which goes back to istiod.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Final, TypeVar

from agent.core.errors import ProtocolError
from agent.core.wire.protobuf import Message
from agent.ztunnel.mesh.mesh_model import (
    ApplicationTunnel,
    Authorization,
    AuthorizationAction,
    AuthorizationMatch,
    AuthorizationScope,
    BalancingMode,
    BalancingScope,
    Conditions,
    Gateway,
    IpFamilies,
    IpNetwork,
    LoadBalancer,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    Ports,
    Service,
    ServiceAccountMatch,
    StringMatch,
    StringRule,
    TunnelProtocol,
    Workload,
    WorkloadProtocol,
)

DEFAULT_TRUST_DOMAIN: Final = "cluster.local"
_PROTOCOLS: Final = (WorkloadProtocol.TCP, WorkloadProtocol.HBONE)
_KINDS: Final = ("deployment", "cronjob", "pod", "job")
_TUNNELS: Final = (TunnelProtocol.NONE, TunnelProtocol.PROXY)
_MODES: Final = (BalancingMode.STANDARD, BalancingMode.STRICT, BalancingMode.FAILOVER, BalancingMode.PASSTHROUGH)
_SCOPES: Final = (None, *BalancingScope)
_FAMILIES: Final = (None, IpFamilies.IPV4, IpFamilies.IPV6, IpFamilies.DUAL)
_POLICY_SCOPES: Final = tuple(AuthorizationScope)
_ACTIONS: Final = tuple(AuthorizationAction)
_STRING_RULES: Final = {1: StringRule.EXACT, 2: StringRule.PREFIX, 3: StringRule.SUFFIX, 4: StringRule.PRESENCE}
_ADDRESS_LENGTHS: Final = (4, 16)

E = TypeVar("E", bound=StrEnum | IpFamilies | str | None)


def address(data: bytes) -> Workload | Service:
    """Decodes an istio.workload.Address. Raises ProtocolError."""
    message = Message(data)
    if workload := message.message(1):
        return _workload(workload)
    if service := message.message(2):
        return _service(service)
    raise ProtocolError("an Address with neither a workload nor a service")


def authorization(data: bytes) -> Authorization:
    """Decodes an istio.security.Authorization. Raises ProtocolError."""
    message = Message(data)
    return Authorization(
        name=message.text(1),
        namespace=message.text(2),
        scope=_chosen(_POLICY_SCOPES, message.number(3), "policy scope"),
        action=_chosen(_ACTIONS, message.number(4), "policy action"),
        rules=tuple(
            tuple(tuple(_match(match) for match in clause.messages(2)) for clause in rule.messages(1))
            for rule in message.messages(5)
        ),
        dry_run=bool(message.number(6)),
    )


def _workload(message: Message) -> Workload:
    locality = message.message(24)
    capacity = message.message(27)
    return Workload(
        uid=message.text(20),
        name=message.text(1),
        namespace=message.text(2),
        addresses=tuple(map(_ip, message.every_raw(3))),
        hostname=message.text(21),
        network=message.text(4),
        protocol=_chosen(_PROTOCOLS, message.number(5), "tunnel protocol"),
        trust_domain=message.text(6) or DEFAULT_TRUST_DOMAIN,
        service_account=message.text(7) or "default",
        waypoint=_gateway(message.message(8)),
        network_gateway=_gateway(message.message(19)),
        node=message.text(9),
        canonical_name=message.text(10),
        canonical_revision=message.text(11),
        workload_type=_chosen(_KINDS, message.number(12), "workload type"),
        workload_name=message.text(13),
        native_tunnel=bool(message.number(14)),
        application_tunnel=_tunnel(message.message(23)),
        services={entry.text(1): _ports(entry.message(2)) for entry in message.messages(22)},
        authorization_policies=message.texts(16),
        healthy=not message.number(17),
        cluster_id=message.text(18),
        locality=Locality(*(locality.text(field) for field in (1, 2, 3))) if locality else Locality(),
        host_network=message.number(25) == 1,
        capacity=capacity.number(1) if capacity else 1,
    )


def _tunnel(message: Message | None) -> ApplicationTunnel | None:
    if message is None:
        return None
    return ApplicationTunnel(_chosen(_TUNNELS, message.number(1), "application tunnel"), message.number(2))


def _service(message: Message) -> Service:
    addresses: list[NetworkAddress] = []
    ranges: list[tuple[str, IpNetwork]] = []
    for each in message.messages(4):
        if 3 in each:  # a length, which may be 0
            ranges.append((each.text(1), _range(each.raw(2), each.number(3))))
        else:
            addresses.append(NetworkAddress(each.text(1), _ip(each.raw(2))))
    return Service(
        name=message.text(1),
        namespace=message.text(2),
        hostname=message.text(3),
        addresses=tuple(addresses),
        ranges=tuple(ranges),
        ports=_port_map(message.messages(5)),
        subject_alt_names=message.texts(6),
        waypoint=_gateway(message.message(7)),
        load_balancer=_balancer(message.message(8)),
        ip_families=_chosen(_FAMILIES, message.number(9), "IP family"),
        canonical=bool(message.number(11)),
        weighted_waypoints=tuple(
            (gateway, each.number(2))
            for each in message.messages(13)
            if (gateway := _gateway(each.message(1))) is not None
        ),
        namespace_only=message.number(14) == 1,
    )


def _balancer(message: Message | None) -> LoadBalancer | None:
    if message is None:
        return None
    scopes = (_chosen(_SCOPES, number, "load balancing scope") for number in message.numbers(1))
    return LoadBalancer(
        tuple(scope for scope in scopes if scope is not None),
        _chosen(_MODES, message.number(2), "load balancing mode"),
        message.number(3) == 1,
    )


def _gateway(message: Message | None) -> Gateway | None:
    if message is None:
        return None
    port = message.number(3)
    if named := message.message(1):
        return Gateway(NamespacedHostname(named.text(1), named.text(2)), port)
    if reached := message.message(2):
        return Gateway(NetworkAddress(reached.text(1), _ip(reached.raw(2))), port)
    raise ProtocolError("a gateway with neither a host name nor an address")


def _ports(message: Message | None) -> Ports:
    return _port_map(message.messages(1)) if message else {}


def _port_map(ports: Iterable[Message]) -> Ports:
    return {port.number(1): port.number(2) for port in ports}


def _match(message: Message) -> AuthorizationMatch:
    return AuthorizationMatch(
        _conditions(message, (1, 11, 3, 5, 7, 9)),
        _conditions(message, (2, 12, 4, 6, 8, 10)),
    )


def _conditions(message: Message, numbers: tuple[int, int, int, int, int, int]) -> Conditions:
    namespaces, accounts, principals, sources, destinations, ports = numbers
    return Conditions(
        namespaces=_string_matches(message.messages(namespaces)),
        service_accounts=tuple(ServiceAccountMatch(one.text(1), one.text(2)) for one in message.messages(accounts)),
        principals=_string_matches(message.messages(principals)),
        source_ips=tuple(_range(one.raw(1), one.number(2)) for one in message.messages(sources)),
        destination_ips=tuple(_range(one.raw(1), one.number(2)) for one in message.messages(destinations)),
        destination_ports=message.numbers(ports),
    )


def _string_matches(messages: Iterable[Message]) -> tuple[StringMatch, ...]:
    found = []
    for message in messages:
        for field, rule in _STRING_RULES.items():
            if field in message:
                found.append(StringMatch(rule, "" if rule is StringRule.PRESENCE else message.text(field)))
    return tuple(found)


def _ip(packed: bytes) -> str:
    if len(packed) not in _ADDRESS_LENGTHS:
        raise ProtocolError(f"an address of {len(packed)} bytes")
    return str(ip_address(packed))


def _range(packed: bytes, length: int) -> IpNetwork:
    try:
        return ip_network(f"{_ip(packed)}/{length}", strict=False)
    except ValueError:
        raise ProtocolError(f"an address with a prefix of {length} bits") from None


def _chosen(values: Sequence[E], number: int, what: str) -> E:
    if number >= len(values):
        raise ProtocolError(f"{what} {number} is not known")
    return values[number]
