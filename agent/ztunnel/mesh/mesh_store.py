# SPDX-License-Identifier: Apache-2.0
"""Holds the mesh and finds in it: by address, by name, by host name. No IO.

An endpoint is a workload that names the service. Whether an unhealthy one counts is the service's choice, so it is
decided when the endpoints are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from agent.ztunnel.mesh.mesh_model import (
    Authorization,
    AuthorizationScope,
    Gateway,
    IpNetwork,
    NamespacedHostname,
    NetworkAddress,
    Ports,
    Service,
    Workload,
)

PART: Final = 64  # resources in one part of a large change


@dataclass(frozen=True, slots=True)
class Mesh:
    """A whole state, as a local file has it."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Authorization, ...] = ()


@dataclass(frozen=True, slots=True)
class MeshDelta:
    """A change of the mesh. Names in `removed` are uids or namespace/hostname, in `removed_policies` namespace/name."""

    changed: tuple[Workload | Service, ...] = ()
    removed: tuple[str, ...] = ()
    policies: Mapping[str, Authorization] = field(default_factory=dict)
    removed_policies: tuple[str, ...] = ()

    def parts(self) -> Iterator[MeshDelta]:
        """Yields parts that take some milliseconds each, in the order to apply them; a small change is one part.

        Policies stay together: some of them without the others would end connections. Workloads come before services,
        which would lack endpoints, and what is removed ends last, unless its name is used again.
        """
        if len(self.changed) + len(self.removed) <= PART:
            yield self
            return
        changed = sorted(self.changed, key=lambda one: isinstance(one, Service))
        names = {one.uid if isinstance(one, Workload) else one.key for one in changed}
        used_again = tuple(name for name in self.removed if name in names)
        yield MeshDelta(removed=used_again, policies=self.policies, removed_policies=self.removed_policies)
        for at in range(0, len(changed), PART):
            yield MeshDelta(changed=tuple(changed[at : at + PART]))
        removed = [name for name in self.removed if name not in names]
        for at in range(0, len(removed), PART):
            yield MeshDelta(removed=tuple(removed[at : at + PART]))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A workload behind a service. `ports` are those that the workload has for it."""

    workload: Workload
    ports: Ports


class MeshStore:
    """The current state. One thread."""

    def __init__(self, preferred_namespace: str = "") -> None:
        """Takes the namespace that is preferred among services with the same host name in DNS."""
        self.preferred_namespace = preferred_namespace
        self.workloads: dict[str, Workload] = {}  # by uid
        self.services: dict[str, Service] = {}  # by namespace/hostname
        self.resolved: dict[str, tuple[str, ...]] = {}  # addresses of host names, while they are known (host_resolver)
        self.services_version = 0  # another one after each change of them
        self.policies: dict[str, Authorization] = {}  # by namespace/name
        self._by_address: dict[NetworkAddress, dict[str, Workload]] = {}
        self._by_pod: dict[tuple[str, str], dict[str, Workload]] = {}  # (namespace, name)
        self._endpoints: dict[str, dict[str, Endpoint]] = {}  # service key, uid
        self._by_vip: dict[NetworkAddress, dict[str, Service]] = {}
        self._by_hostname: dict[str, dict[str, Service]] = {}
        self._ranges: dict[str, Service] = {}  # services with ranges of addresses

    def difference(self, mesh: Mesh) -> MeshDelta:
        """Returns the change from this state to a whole one."""
        uids = {workload.uid for workload in mesh.workloads}
        keys = {service.key for service in mesh.services}
        policies = {policy.key: policy for policy in mesh.policies}
        removed = (self.workloads.keys() - uids) | (self.services.keys() - keys)
        # A workload may have the name of a service that is removed; the removal takes both, and comes first.
        workloads = (one for one in mesh.workloads if one.uid in removed or self.workloads.get(one.uid) != one)
        services = (one for one in mesh.services if one.key in removed or self.services.get(one.key) != one)
        return MeshDelta(
            changed=(*workloads, *services),
            removed=tuple(removed),
            policies={key: policy for key, policy in policies.items() if self.policies.get(key) != policy},
            removed_policies=tuple(self.policies.keys() - policies.keys()),
        )

    def apply(self, delta: MeshDelta) -> None:
        """Puts a change into the store."""
        for name in delta.removed:
            self.remove_workload(name)
            self.remove_service(name)
        for each in delta.changed:
            if isinstance(each, Workload):
                self.put_workload(each)
            else:
                self.put_service(each)
        self.policies.update(delta.policies)
        for name in delta.removed_policies:
            self.policies.pop(name, None)

    def put_workload(self, workload: Workload) -> None:
        if self.workloads.get(workload.uid) == workload:
            return
        self.remove_workload(workload.uid)
        self.workloads[workload.uid] = workload
        for ip in workload.addresses:
            self._by_address.setdefault(NetworkAddress(workload.network, ip), {})[workload.uid] = workload
        self._by_pod.setdefault((workload.namespace, workload.name), {})[workload.uid] = workload
        for key, ports in workload.services.items():
            self._endpoints.setdefault(key, {})[workload.uid] = Endpoint(workload, ports)

    def remove_workload(self, uid: str) -> None:
        """Forgets a workload; no error if it is not known."""
        workload = self.workloads.pop(uid, None)
        if workload is None:
            return
        for ip in workload.addresses:
            _discard(self._by_address, NetworkAddress(workload.network, ip), uid)
        _discard(self._by_pod, (workload.namespace, workload.name), uid)
        for key in workload.services:
            _discard(self._endpoints, key, uid)

    def put_service(self, service: Service) -> None:
        if self.services.get(service.key) == service:
            return
        self.remove_service(service.key)
        self.services[service.key] = service
        self.services_version += 1
        for address in service.addresses:
            self._by_vip.setdefault(address, {})[service.key] = service
        self._by_hostname.setdefault(service.hostname, {})[service.key] = service
        if service.ranges:
            self._ranges[service.key] = service

    def remove_service(self, key: str) -> None:
        """Forgets a service; no error if it is not known."""
        service = self.services.pop(key, None)
        if service is None:
            return
        self.services_version += 1
        for address in service.addresses:
            _discard(self._by_vip, address, key)
        _discard(self._by_hostname, service.hostname, key)
        self._ranges.pop(key, None)

    def workload_at(self, network: str, ip: str) -> Workload | None:
        """Returns the workload with the address. Of several, one that is not on its host's network comes first."""
        found = self._by_address.get(NetworkAddress(network, ip), {})
        return min(found.values(), key=lambda workload: (workload.host_network, workload.uid), default=None)

    def workload_of_pod(self, namespace: str, name: str, service_account: str) -> Workload | None:
        """Returns the workload of a pod of this node; the service account must be the same, for it is the identity."""
        for workload in self._by_pod.get((namespace, name), {}).values():
            if workload.service_account == service_account:
                return workload
        return None

    def service_at(self, network: str, ip: str, namespace: str) -> Service | None:
        """Returns the service with the address, as a client in `namespace` sees it."""
        exact = self._by_vip.get(NetworkAddress(network, ip), {})
        if service := best(_visible(exact.values(), namespace), namespace):
            return service
        if not self._ranges:
            return None
        address = ip_address(ip)
        return max(
            (
                (service.namespace == namespace, addresses.prefixlen, service.canonical, service)
                for service, addresses in self._ranges_of(network)
                if address in addresses and service.visible_to(namespace)
            ),
            key=lambda ranked: ranked[:3],
            default=(None,),
        )[-1]

    def _ranges_of(self, network: str) -> Iterator[tuple[Service, IpNetwork]]:
        for service in self._ranges.values():
            for where, addresses in service.ranges:
                if where == network:
                    yield service, addresses

    def service_named(self, hostname: str, namespace: str) -> Service | None:
        """Returns the service with the host name, as a client in `namespace` sees it."""
        return best(self.services_named(hostname, namespace), namespace)

    def services_named(self, hostname: str, namespace: str) -> list[Service]:
        """Returns all services with the host name that a client in `namespace` sees."""
        return _visible(self._by_hostname.get(hostname, {}).values(), namespace)

    def services_of(self, workload: Workload) -> list[Service]:
        return [self.services[key] for key in workload.services if key in self.services]

    def endpoints(self, service: Service) -> list[Endpoint]:
        """Returns the endpoints that may be used: healthy ones, or all if the service says so."""
        every = self.all_endpoints(service)
        if service.load_balancer and service.load_balancer.unhealthy_too:
            return every
        return [endpoint for endpoint in every if endpoint.workload.healthy]

    def all_endpoints(self, service: Service) -> list[Endpoint]:
        """Returns the endpoints, healthy or not."""
        return list(self._endpoints.get(service.key, {}).values())

    def endpoint(self, service: Service, workload: Workload) -> Endpoint | None:
        """Returns the workload as an endpoint of the service, healthy or not."""
        return self._endpoints.get(service.key, {}).get(workload.uid)

    def gateway(self, gateway: Gateway) -> Service | Workload | None:
        """Returns what a gateway's reference names."""
        destination = gateway.destination
        if isinstance(destination, NamespacedHostname):
            service = self.services.get(str(destination))
            return service or self._workload_named(destination)
        return self.service_at(destination.network, destination.ip, "") or self.workload_at(
            destination.network, destination.ip
        )

    def _workload_named(self, name: NamespacedHostname) -> Workload | None:
        # Rare: an index would cost memory for every workload.
        for workload in self.workloads.values():
            if workload.hostname == name.hostname and workload.namespace == name.namespace:
                return workload
        return None

    def policies_for(self, workload: Workload) -> tuple[list[Authorization], list[str]]:
        """Returns (policies that select the workload, names of policies that it needs and that are not known)."""
        selected = [
            policy
            for policy in self.policies.values()
            if policy.scope is not AuthorizationScope.WORKLOAD and policy.namespace in ("", workload.namespace)
        ]
        unknown = []
        for key in workload.authorization_policies:
            if policy := self.policies.get(key):
                selected.append(policy)
            else:
                unknown.append(key)
        return selected, unknown


def best(services: Iterable[Service], namespace: str, preferred: str = "") -> Service | None:
    """Returns the service of the client's namespace, else the canonical one, else the preferred namespace's, or any."""

    def rank(service: Service) -> int:
        if service.namespace == namespace:
            return 0
        if service.canonical:
            return 1
        return 2 if preferred and service.namespace == preferred else 3

    return min(services, key=rank, default=None)


def _visible(services: Iterable[Service], namespace: str) -> list[Service]:
    """Returns the services that clients of the namespace see; "" sees all."""
    return [service for service in services if not namespace or service.visible_to(namespace)]


def _discard(index: dict, key: object, member: str) -> None:  # type: ignore[type-arg]
    members = index.get(key)
    if members is not None:
        members.pop(member, None)
        if not members:
            del index[key]
