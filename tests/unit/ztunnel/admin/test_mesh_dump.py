# SPDX-License-Identifier: Apache-2.0
"""The dump of a mesh is a mesh file again, but for the ports of workloads, which are with the endpoints."""

from __future__ import annotations

import json

from agent.ztunnel.admin import mesh_dump
from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.mesh_store import MeshStore

MESH = """
workloads:
- {uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: td, protocol: HBONE, node: n,
   workloadIps: [10.0.0.1, "fd00::1"], workloadName: web-v1, workloadType: deployment, canonicalName: web,
   canonicalRevision: v1, clusterId: c1, locality: {region: r, zone: z, subzone: s}, network: n1, hostname: h,
   networkMode: HostNetwork, nativeTunnel: true, applicationTunnel: {protocol: PROXY, port: 15088}, capacity: 3,
   authorizationPolicies: [demo/all], status: Unhealthy, services: {demo/web.demo: {80: 8080}},
   waypoint: {destination: demo/waypoint.demo, hboneMtlsPort: 15008},
   networkGateway: {destination: n1/10.0.0.9, hboneMtlsPort: 15009}}
services:
- {name: web, namespace: demo, hostname: web.demo, vips: [n1/10.9.0.1], ports: {80: 0},
   cidrVips: [{network: n1, cidr: 10.8.0.0/16}], subjectAltNames: ["spiffe://td/ns/demo/sa/web"],
   waypoint: {destination: n1/10.0.0.8, hboneMtlsPort: 15008},
   weightedWaypoints: [{destination: {destination: n1/10.0.0.8, hboneMtlsPort: 15008}, weight: 7}],
   loadBalancer: {routingPreferences: [Region, Node], mode: Failover, healthPolicy: AllowAll}, ipFamilies: IPv4,
   canonical: true, visibility: Namespace}
policies:
- {name: all, namespace: demo, scope: WorkloadSelector, action: Allow, dryRun: true, rules: [[[
   {principals: [!Exact td/ns/demo/sa/web, !Prefix td/, !Suffix /web, Presence],
    notNamespaces: [!Exact other], serviceAccounts: [{namespace: demo, serviceAccount: web}],
    sourceIps: [10.0.0.0/8], notDestinationIps: ["fd00::/8"], destinationPorts: [80, 443]}]]]}
"""


def test_what_is_dumped_is_the_mesh_that_was_read() -> None:
    read = local_mesh.parse(MESH)
    store = MeshStore()
    store.apply(store.difference(read))
    dumped = json.loads(json.dumps(mesh_dump.mesh(store)))
    assert [workload.pop("services") for workload in dumped["workloads"]] == [["demo/web.demo"]]
    assert local_mesh.parse(json.dumps({
        **dumped, "workloads": [{**workload, "services": {}} for workload in dumped["workloads"]],
    })) == read  # fmt: skip


def test_istioctl_reads_the_values() -> None:
    """It takes no bare `Presence`, and counts the endpoints, which are those that may be used."""
    store = MeshStore()
    read = local_mesh.parse("""
workloads:
- {uid: a, name: a, namespace: demo, protocol: TCP, workloadIps: [], services: {demo/web.demo: {80: 8080}}}
- {uid: b, name: b, namespace: demo, protocol: TCP, workloadIps: [], status: Unhealthy,
   services: {demo/web.demo: {80: 8080}}}
services:
- {name: web, namespace: demo, hostname: web.demo, vips: [], ports: {80: 8080}}
- {name: none, namespace: demo, hostname: none.demo, vips: [], ports: {}}
policies:
- {name: strict, namespace: demo, scope: WorkloadSelector, action: Deny, dryRun: false,
   rules: [[[{notPrincipals: [!Presence []]}]]]}
""")
    store.apply(store.difference(read))
    dumped = mesh_dump.mesh(store)
    assert [(one["workloadIps"], one["clusterId"]) for one in dumped["workloads"]] == [([], ""), ([], "")]
    none, web = dumped["services"]
    assert (none["vips"], none["ports"], none["endpoints"], none["subjectAltNames"]) == ([], {}, {}, [])
    assert web["endpoints"] == {"a": {"workloadUid": "a", "port": {"80": 8080}, "status": "Healthy"}}
    assert dumped["policies"][0]["rules"] == [[[{"notPrincipals": [{"Presence": []}]}]]]
