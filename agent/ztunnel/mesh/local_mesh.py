# SPDX-License-Identifier: Apache-2.0
"""Parses the mesh from a YAML file in the format of Istio's LOCAL_XDS_PATH. Pure.

One file works for both ztunnels. An error names the place, as `workloads[2].waypoint.hboneMtlsPort`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import yaml

from agent.core.errors import SluiceError
from agent.ztunnel.mesh.mesh_model import (
    NO_CONDITIONS,
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
from agent.ztunnel.mesh.mesh_store import Mesh

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


class MeshFileError(SluiceError):
    """The file is no mesh; the text has the place and the reason."""


def parse(text: str) -> Mesh:
    """Returns the mesh of the file. Raises MeshFileError."""
    try:
        document = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise MeshFileError(f"no YAML: {' '.join(str(error).split())}") from None
    top = _Reader(document, "")
    workloads = top.many("workloads", _workload)
    services = top.many("services", _service)
    policies = top.many("policies", _policy)
    top.end()
    workloads = _with_endpoints(workloads, [(service.key, ends) for service, ends in services])
    _unique("workload", (workload.uid for workload in workloads))
    _unique("service", (service.key for service, _ in services))
    _unique("policy", (policy.key for policy in policies))
    _unique(
        "address",
        (f"{one.network}/{ip}" for one in workloads if not one.host_network for ip in one.addresses),
    )
    return Mesh(tuple(workloads), tuple(service for service, _ in services), tuple(policies))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # six times faster, if it is built
    """Knows the tags with which serde_yaml writes enums with a value, as `!Exact name`."""


def _tagged(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    value = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else ""
    return {node.tag.removeprefix("!"): value}


for _rule in StringRule:
    _Loader.add_constructor(f"!{_rule.value}", _tagged)


class _Reader:
    """Reads a mapping and knows its place. `end` refuses keys that were not read."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, Mapping):
            raise MeshFileError(f"{place or 'the file'} is no mapping")
        self._left = dict(value)
        self.place = place

    def fail(self, key: str, reason: str) -> MeshFileError:
        return MeshFileError(f"{self._at(key)}: {reason}")

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str) -> Any:
        return self._left.pop(key, None)

    def text(self, key: str, default: str | None = "") -> str:
        """Returns a string; without a default the key must be there."""
        value = self.take(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise self.fail(key, "is no string")
        return str(value)

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if value not in (None, True, False):
            raise self.fail(key, "is neither true nor false")
        return bool(value)

    def number(self, key: str, default: int | None, most: int) -> int:
        value = self.take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self.fail(key, f"is no number from 0 to {most}")
        return value

    def choice(self, key: str, kind: type[E], default: E | None) -> E:
        text = self.text(key, default.value if default else None)
        for each in kind:
            if each.value.lower() == text.lower():
                return each
        raise self.fail(key, f"is not one of {', '.join(each.value for each in kind)}")

    def values(self, key: str, convert: Callable[[Any], T]) -> tuple[T, ...]:
        """Returns a list of scalars, converted; `convert` raises ValueError with the reason."""
        found = self.take(key)
        if found is None:
            return ()
        if not isinstance(found, list):
            raise self.fail(key, "is no list")
        result = []
        for index, value in enumerate(found):
            try:
                result.append(convert(value))
            except (ValueError, TypeError) as error:
                raise self.fail(f"{key}[{index}]", str(error)) from None
        return tuple(result)

    def many(self, key: str, convert: Callable[[_Reader], T]) -> list[T]:
        """Returns a list of mappings, converted and read to their end."""
        found = self.take(key) or []
        if not isinstance(found, list):
            raise self.fail(key, "is no list")
        return [_whole(value, f"{self._at(key)}[{index}]", convert) for index, value in enumerate(found)]

    def one(self, key: str, convert: Callable[[_Reader], T]) -> T | None:
        found = self.take(key)
        return None if found is None else _whole(found, self._at(key), convert)

    def ports(self, key: str) -> Ports:
        found = self.take(key)
        if found is None:
            return {}
        try:
            return {_port(front): _port(target) for front, target in found.items()}
        except (AttributeError, ValueError, TypeError):
            raise self.fail(key, "is no map of ports") from None

    def end(self) -> None:
        if self._left:
            raise self.fail(str(next(iter(self._left))), "is not a known key")


def _whole(value: object, place: str, convert: Callable[[_Reader], T]) -> T:
    reader = _Reader(value, place)
    result = convert(reader)
    reader.end()
    return result


def _workload(reader: _Reader) -> Workload:
    name = reader.text("name")
    namespace = reader.text("namespace", None)
    uid = reader.text("uid") or f"local//v1/Pod/{namespace}/{name}"
    services = reader.take("services")
    if not isinstance(services, Mapping):
        raise reader.fail("services", "is missing, or no map; it may be {}")
    return Workload(
        uid=uid,
        name=name,
        namespace=namespace,
        service_account=reader.text("serviceAccount"),
        trust_domain=reader.text("trustDomain"),
        addresses=reader.values("workloadIps", _ip),
        hostname=reader.text("hostname"),
        network=reader.text("network"),
        host_network=reader.text("networkMode", "Standard") == "HostNetwork",
        protocol=reader.choice("protocol", WorkloadProtocol, WorkloadProtocol.TCP),
        node=reader.text("node"),
        cluster_id=reader.text("clusterId"),
        workload_name=reader.text("workloadName"),
        workload_type=reader.text("workloadType"),
        canonical_name=reader.text("canonicalName"),
        canonical_revision=reader.text("canonicalRevision"),
        waypoint=reader.one("waypoint", _gateway),
        network_gateway=reader.one("networkGateway", _gateway),
        native_tunnel=reader.flag("nativeTunnel"),
        application_tunnel=reader.one("applicationTunnel", _tunnel),
        authorization_policies=reader.values("authorizationPolicies", str),
        healthy=reader.text("status", "Healthy") == "Healthy",
        locality=reader.one("locality", _locality) or Locality(),
        capacity=reader.number("capacity", 1, 2**32 - 1),
        services={
            key: _Reader({"ports": ports}, f"{reader.place}.services").ports("ports") for key, ports in services.items()
        },
    )


def _locality(reader: _Reader) -> Locality:
    return Locality(reader.text("region"), reader.text("zone"), reader.text("subzone"))


def _tunnel(reader: _Reader) -> ApplicationTunnel:
    return ApplicationTunnel(reader.choice("protocol", TunnelProtocol, None), reader.number("port", 0, 65535))


def _gateway(reader: _Reader) -> Gateway:
    text = reader.text("destination", None)
    place, _, name = text.partition("/")
    try:
        destination: NetworkAddress | NamespacedHostname = NetworkAddress(place, _ip(name))
    except ValueError:
        if not place or not name:
            raise reader.fail("destination", f"{text!r} is neither network/address nor namespace/hostname") from None
        destination = NamespacedHostname(place, name)
    return Gateway(destination, reader.number("hboneMtlsPort", None, 65535))


def _service(reader: _Reader) -> tuple[Service, list[tuple[str, Ports]]]:
    service = Service(
        name=reader.text("name", None),
        namespace=reader.text("namespace", None),
        hostname=reader.text("hostname", None),
        addresses=reader.values("vips", _network_address),
        ranges=tuple(reader.many("cidrVips", _network_range)),
        ports=reader.ports("ports"),
        subject_alt_names=reader.values("subjectAltNames", str),
        waypoint=reader.one("waypoint", _gateway),
        weighted_waypoints=tuple(reader.many("weightedWaypoints", _weighted)),
        load_balancer=reader.one("loadBalancer", _balancer),
        ip_families=_families(reader),
        canonical=reader.flag("canonical"),
        namespace_only=reader.text("visibility", "Public") == "Namespace",
    )
    endpoints = reader.take("endpoints") or {}
    if not isinstance(endpoints, Mapping):
        raise reader.fail("endpoints", "is no map")
    return service, [_whole(each, f"{reader.place}.endpoints", _endpoint) for each in endpoints.values()]


def _endpoint(reader: _Reader) -> tuple[str, Ports]:
    reader.take("status")  # the workload has it
    return reader.text("workloadUid", None), reader.ports("port")


def _weighted(reader: _Reader) -> tuple[Gateway, int]:
    gateway = reader.one("destination", _gateway)
    if gateway is None:
        raise reader.fail("destination", "is missing")
    return gateway, reader.number("weight", None, 2**32 - 1)


def _balancer(reader: _Reader) -> LoadBalancer:
    return LoadBalancer(
        reader.values("routingPreferences", BalancingScope),
        reader.choice("mode", BalancingMode, BalancingMode.STANDARD),
        reader.text("healthPolicy", "OnlyHealthy") == "AllowAll",
    )


def _families(reader: _Reader) -> IpFamilies | None:
    text = reader.text("ipFamilies")
    if not text:
        return None
    try:
        return IpFamilies[text.upper()]
    except KeyError:
        raise reader.fail("ipFamilies", "is not one of Dual, IPv4, IPv6") from None


def _policy(reader: _Reader) -> Authorization:
    policy = Authorization(
        name=reader.text("name", None),
        namespace=reader.text("namespace"),
        scope=reader.choice("scope", AuthorizationScope, None),
        action=reader.choice("action", AuthorizationAction, None),
        dry_run=reader.flag("dryRun"),
    )
    rules = reader.take("rules") or []
    try:
        return replace(
            policy,
            rules=tuple(
                tuple(tuple(_whole(match, f"{reader.place}.rules", _match) for match in clause) for clause in rule)
                for rule in rules
            ),
        )
    except TypeError:
        raise reader.fail("rules", "is no list of lists of lists") from None


def _match(reader: _Reader) -> AuthorizationMatch:
    required = _conditions(reader, lambda name: name)
    forbidden = _conditions(reader, lambda name: f"not{name[0].upper()}{name[1:]}")
    return AuthorizationMatch(required, forbidden)


def _conditions(reader: _Reader, key: Callable[[str], str]) -> Conditions:
    conditions = Conditions(
        namespaces=reader.values(key("namespaces"), _string_match),
        service_accounts=reader.values(key("serviceAccounts"), _account),
        principals=reader.values(key("principals"), _string_match),
        source_ips=reader.values(key("sourceIps"), _ip_range),
        destination_ips=reader.values(key("destinationIps"), _ip_range),
        destination_ports=reader.values(key("destinationPorts"), _port),
    )
    return NO_CONDITIONS if conditions == NO_CONDITIONS else conditions


def _string_match(value: object) -> StringMatch:
    if value == StringRule.PRESENCE.value:
        return StringMatch(StringRule.PRESENCE)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError("is not one of Exact, Prefix, Suffix, Presence")
    ((rule, pattern),) = value.items()
    return StringMatch(StringRule(rule), str(pattern or ""))


def _account(value: object) -> ServiceAccountMatch:
    if not isinstance(value, Mapping) or value.keys() != {"namespace", "serviceAccount"}:
        raise ValueError("has not just namespace and serviceAccount")
    return ServiceAccountMatch(str(value["namespace"]), str(value["serviceAccount"]))


def _ip(value: object) -> str:
    return str(ip_address(str(value)))


def _ip_range(value: object) -> IpNetwork:
    return ip_network(str(value), strict=False)


def _port(value: object) -> int:
    number = int(str(value))
    if not 0 <= number <= 65535:
        raise ValueError(f"{number} is no port")
    return number


def _network_address(value: object) -> NetworkAddress:
    network, slash, ip = str(value).rpartition("/")
    if not slash:
        raise ValueError(f"{value!r} is not network/address; the network may be empty")
    return NetworkAddress(network, _ip(ip))


def _network_range(reader: _Reader) -> tuple[str, IpNetwork]:
    try:
        return reader.text("network"), _ip_range(reader.text("cidr", None))
    except ValueError as error:
        raise reader.fail("cidr", str(error)) from None


def _with_endpoints(
    workloads: list[Workload], endpoints: Iterable[tuple[str, list[tuple[str, Ports]]]]
) -> list[Workload]:
    """Returns the workloads with the endpoints that services name themselves."""
    more: dict[str, dict[str, Ports]] = {}
    for service, named in endpoints:
        for uid, ports in named:
            more.setdefault(uid, {})[service] = ports
    return [
        replace(workload, services={**more[workload.uid], **workload.services}) if workload.uid in more else workload
        for workload in workloads
    ]


def _unique(what: str, names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise MeshFileError(f"{what} {name} occurs twice")
        seen.add(name)
