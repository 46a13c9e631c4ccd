# SPDX-License-Identifier: Apache-2.0
"""Objects as a real API server holds them, with the bulk that nobody here looks at."""

from __future__ import annotations

import ipaddress
import uuid
from typing import Any

Json = dict[str, Any]


def pod(
    name: str,
    *,
    namespace: str = "shop",
    node: str = "node1",
    address: str = "",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    uid: str = "",
    phase: str = "Running",
    host_network: bool = False,
) -> Json:
    """Some 5 KB as JSON, of which managedFields are the most, as in real clusters."""
    uid = uid or str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{namespace}"))
    marks = {f"f:label-{at}": {} for at in range(40)}
    container = {
        "name": "app",
        "image": f"registry.example/{name}:1.2.3",
        "env": [{"name": f"SETTING_{at}", "value": "x" * 20} for at in range(10)],
        "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
    }
    state = {"running": {"startedAt": "2026-11-21T08:00:00Z"}} if phase == "Running" else {"waiting": {"reason": "X"}}
    if phase in ("Succeeded", "Failed"):
        state = {"terminated": {"exitCode": 0 if phase == "Succeeded" else 1}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "labels": {"app": name.partition("-")[0], **(labels or {})},
            "annotations": dict(annotations or {}),
            "managedFields": [
                {"manager": manager, "operation": "Update", "fieldsV1": {"f:metadata": marks, "f:spec": marks}}
                for manager in ("kube-controller-manager", "kubelet")
            ],
        },
        "spec": {
            "nodeName": node,
            "serviceAccountName": "default",
            "hostNetwork": host_network,
            "containers": [container],
        },
        "status": {
            "phase": phase,
            **({"podIP": address, "podIPs": [{"ip": address}]} if address else {}),
            "containerStatuses": [{"name": "app", "containerID": f"containerd://{uid[:8]}", "state": state}],
        },
    }


def namespace(name: str, **labels: str) -> Json:
    """Key `ambient` is label istio.io/dataplane-mode; others are as given."""
    found = {key.replace("ambient", "istio.io/dataplane-mode"): value for key, value in labels.items()}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "uid": name, "labels": found}}


def service(name: str, address: str, ports: list[int], namespace: str = "shop") -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "uid": f"s-{namespace}-{name}"},
        "spec": {"clusterIP": address, "ports": [{"port": port, "protocol": "TCP"} for port in ports]},
    }


def node(name: str, taints: list[Json] | None = None) -> Json:
    spec = {} if taints is None else {"taints": taints}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": name}, "spec": spec}


def cluster(pods: int, on_node: int, services: int = 0, node: str = "node1") -> list[Json]:
    """`pods` in all, the first `on_node` of them on `node`, in 100 namespaces, with an address each."""
    found: list[Json] = [namespace(f"team-{at}", ambient="ambient") for at in range(100)]
    first = int(ipaddress.ip_address("10.0.0.1"))
    for at in range(pods):
        where = node if at < on_node else f"node{2 + at // 100}"
        name = f"web{at % 500}-6d4cf56db6-{at:05d}"
        labels = {"pod-template-hash": "6d4cf56db6", "version": "v1"}
        address = str(ipaddress.ip_address(first + at))
        found.append(pod(name, namespace=f"team-{at % 100}", node=where, address=address, labels=labels))
    base = int(ipaddress.ip_address("10.96.0.10"))
    for at in range(services):
        found.append(service(f"svc{at}", str(ipaddress.ip_address(base + at)), [80, 443], f"team-{at % 100}"))
    return found
