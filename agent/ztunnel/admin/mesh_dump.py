# SPDX-License-Identifier: Apache-2.0
"""Writes workloads, services and policies as JSON in the form of Istio's /config_dump, which istioctl reads. Pure.

The form is nearly that of a local mesh file; a workload's ports are with the endpoints of its services.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from agent.ztunnel.mesh.mesh_model import (
    Authorization,
    AuthorizationMatch,
    Conditions,
    Gateway,
    IpFamilies,
    Locality,
    Ports,
    Service,
    StringMatch,
    StringRule,
    Workload,
)
from agent.ztunnel.mesh.mesh_store import MeshStore

_FAMILIES = {IpFamilies.DUAL: "Dual", IpFamilies.IPV4: "IPv4", IpFamilies.IPV6: "IPv6"}


def mesh(store: MeshStore) -> dict[str, Any]:
    """Returns the keys workloads, services and policies, each a sorted list."""
    return {
        "workloads": [_workload(each) for _, each in sorted(store.workloads.items())],
        "services": [_service(store, each) for _, each in sorted(store.services.items())],
        "policies": [_policy(each) for _, each in sorted(store.policies.items())],
    }


def _present(pairs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out empty values, as Istio does with all but a few."""
    return {key: value for key, value in pairs.items() if value not in (None, "", (), [], {})}


def _workload(one: Workload) -> dict[str, Any]:
    tunnel = one.application_tunnel
    place = one.locality
    return {"workloadIps": list(one.addresses), "name": one.name, "clusterId": one.cluster_id} | _present({
        "waypoint": _gateway(one.waypoint),
        "networkGateway": _gateway(one.network_gateway),
        "protocol": one.protocol.value,
        "networkMode": "HostNetwork" if one.host_network else "Standard",
        "uid": one.uid,
        "namespace": one.namespace,
        "trustDomain": one.trust_domain,
        "serviceAccount": one.service_account,
        "network": one.network,
        "workloadName": one.workload_name,
        "workloadType": one.workload_type,
        "canonicalName": one.canonical_name,
        "canonicalRevision": one.canonical_revision,
        "hostname": one.hostname,
        "node": one.node,
        "nativeTunnel": one.native_tunnel or None,
        "applicationTunnel": {"protocol": tunnel.protocol.value, "port": tunnel.port or None} if tunnel else None,
        "authorizationPolicies": list(one.authorization_policies),
        "status": _status(one),
        "locality": asdict(place) if place != Locality() else None,
        "services": list(one.services),
        "capacity": one.capacity,
    })  # fmt: skip


def _status(one: Workload) -> str:
    return "Healthy" if one.healthy else "Unhealthy"


def _gateway(gateway: Gateway | None) -> dict[str, Any] | None:
    return {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_port} if gateway else None


def _ports(ports: Ports) -> dict[str, int]:
    return {str(front): target for front, target in ports.items()}


def _service(store: MeshStore, one: Service) -> dict[str, Any]:
    balancer = one.load_balancer
    return {
        "vips": [str(address) for address in one.addresses],
        "ports": _ports(one.ports),
        "subjectAltNames": list(one.subject_alt_names),
        "endpoints": {
            endpoint.workload.uid: {
                "workloadUid": endpoint.workload.uid,
                "port": _ports(endpoint.ports),
                "status": _status(endpoint.workload),
            }
            for endpoint in store.endpoints(one)  # as Istio's: those that may be used
        },
    } | _present({
        "name": one.name,
        "namespace": one.namespace,
        "hostname": one.hostname,
        "cidrVips": [{"network": network, "cidr": str(addresses)} for network, addresses in one.ranges],
        "waypoint": _gateway(one.waypoint),
        "weightedWaypoints": [
            {"destination": _gateway(gateway), "weight": weight} for gateway, weight in one.weighted_waypoints
        ],
        "loadBalancer": balancer and {
            "routingPreferences": [scope.value for scope in balancer.scopes],
            "mode": balancer.mode.value,
            "healthPolicy": "AllowAll" if balancer.unhealthy_too else "OnlyHealthy",
        },
        "ipFamilies": _FAMILIES[one.ip_families] if one.ip_families else None,
        "canonical": one.canonical,
        "visibility": "Namespace" if one.namespace_only else "Public",
    })  # fmt: skip


def _policy(one: Authorization) -> dict[str, Any]:
    return {
        "name": one.name,
        "namespace": one.namespace,
        "scope": one.scope.value,
        "action": one.action.value,
        "dryRun": one.dry_run,
        "rules": [[[_match(match) for match in clause] for clause in rule] for rule in one.rules],
    }


def _match(match: AuthorizationMatch) -> dict[str, Any]:
    forbidden = {f"not{key[0].upper()}{key[1:]}": value for key, value in _conditions(match.forbidden).items()}
    return _conditions(match.required) | forbidden


def _conditions(one: Conditions) -> dict[str, Any]:
    return _present({
        "namespaces": [_string(each) for each in one.namespaces],
        "serviceAccounts": [
            {"namespace": each.namespace, "serviceAccount": each.service_account} for each in one.service_accounts
        ],
        "principals": [_string(each) for each in one.principals],
        "sourceIps": [str(each) for each in one.source_ips],
        "destinationIps": [str(each) for each in one.destination_ips],
        "destinationPorts": list(one.destination_ports),
    })  # fmt: skip


def _string(match: StringMatch) -> dict[str, str | list[str]]:
    return {match.rule.value: [] if match.rule is StringRule.PRESENCE else match.pattern}
