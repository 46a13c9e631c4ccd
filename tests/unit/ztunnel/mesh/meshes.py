# SPDX-License-Identifier: Apache-2.0
"""A small mesh for tests, in the file format."""

from __future__ import annotations

from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.mesh_store import MeshStore

FILE = """
workloads:
- uid: c1//v1/Pod/shop/web
  name: web
  namespace: shop
  serviceAccount: web
  trustDomain: cluster.local
  workloadIps: [10.0.0.1, "fd00::1"]
  protocol: HBONE
  node: n1
  clusterId: c1
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  locality: {region: eu, zone: eu-1}
  services: {}
- uid: c1//v1/Pod/shop/db
  name: db
  namespace: shop
  serviceAccount: db
  trustDomain: cluster.local
  workloadIps: [10.0.0.2]
  protocol: HBONE
  node: n2
  services:
    shop/db.shop.svc.cluster.local: {80: 8080}
- uid: c1//v1/Pod/shop/old
  name: old
  namespace: shop
  trustDomain: cluster.local
  workloadIps: [10.0.0.3]
  status: Unhealthy
  services:
    shop/db.shop.svc.cluster.local: {80: 8080}
- uid: c2//v1/Pod/shop/far
  name: far
  namespace: shop
  network: remote
  trustDomain: cluster.local
  workloadIps: []
  protocol: HBONE
  networkGateway: {destination: /10.0.0.9, hboneMtlsPort: 15008}
  services:
    shop/far.shop.svc.cluster.local: {80: 8080}
- uid: c1//v1/Pod/gw/gate
  name: gate
  namespace: gw
  serviceAccount: gate
  trustDomain: cluster.local
  workloadIps: [10.0.0.9]
  protocol: HBONE
  services: {}
services:
- {name: db, namespace: shop, hostname: db.shop.svc.cluster.local, vips: [/10.1.0.2], ports: {80: 8080},
   subjectAltNames: ["spiffe://cluster.local/ns/shop/sa/also"]}
- {name: far, namespace: shop, hostname: far.shop.svc.cluster.local, vips: [/10.1.0.4], ports: {80: 8080},
   subjectAltNames: ["spiffe://cluster.local/ns/shop/sa/far"]}
- {name: empty, namespace: shop, hostname: empty.shop.svc.cluster.local, vips: [/10.1.0.5], ports: {80: 8080}}
- {name: guarded, namespace: shop, hostname: guarded.shop.svc.cluster.local, vips: [/10.1.0.6], ports: {80: 8080},
   waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}}
- {name: headless, namespace: shop, hostname: headless.shop.svc.cluster.local, vips: [], ports: {80: 8080},
   endpoints: {"c1//v1/Pod/shop/db": {workloadUid: "c1//v1/Pod/shop/db", port: {80: 8080}}}}
policies:
- name: only-web
  namespace: shop
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/shop/sa/web]
- name: no-22
  namespace: ""
  scope: Global
  action: Deny
  rules:
  - - - destinationPorts: [22]
"""


def store() -> MeshStore:
    made = MeshStore()
    made.apply(made.difference(local_mesh.parse(FILE)))
    return made
