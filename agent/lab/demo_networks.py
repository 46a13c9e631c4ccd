# SPDX-License-Identifier: Apache-2.0
"""The demo's chapter on two clusters: each node's pods are a network of their own, joined by gateways alone."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import yaml

from agent.core.names import DEFAULT_ACCOUNT, ZTUNNEL_STATS_PORT
from agent.kernel.process_http import page
from agent.lab import demo_mesh, lab_mesh, nodes
from agent.lab.demo_report import Checks
from agent.lab.lab import Lab
from agent.lab.lab_pods import LabPod
from agent.lab.lab_spec import PORTS, PodProgram
from agent.lab.links import remove_namespace
from agent.lab.processes import await_ready
from agent.lab.traffic import still

_CALLS: Final = (("shop/client", "shop/db"), ("shop/db", "shop/web"))  # node1 to node2, and back
_IDENTITY: Final = f"spiffe://cluster.local/ns/shop/sa/{DEFAULT_ACCOUNT}"
_OPENED: Final = re.compile(r"^istio_tcp_connections_opened_total\{(.*)\}", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')


def run_all(lab: Lab, check: Checks) -> None:
    """Divides the lab into two clusters, and unites it again."""
    print("  two clusters: the pods of node1 and those of node2 have no route to each other; each has a gateway")
    with _divided(lab):
        for client, target in _CALLS:
            wire = demo_mesh.carried(lab, client, f"{_vip(lab, target)}:{PORTS[PodProgram.WEB]}")
            check(f"{client} reaches the service of {target} through the gateway", wire.answered)
            direct = lab.pods.require(target).address(PodProgram.WEB)
            check(f"and not {target} by its address", not demo_mesh.call(lab, client, direct))
            check("no packet between the clusters has a byte of it in plain text", wire.hbone > 0 and not wire.readable)
            ends = {reporter: _labels(lab, client, target, reporter) for reporter in ("source", "destination")}
            missing = {name for labels in ends.values() for name, value in labels.items() if value == "unknown"}
            counted = [len(labels) for labels in ends.values()]
            check("both ends know every label of the other", not missing and min(counted) > 20, f"{counted} labels")
            shown = ends["source"]
            print(
                f"    at the source: {shown.get('source_cluster')} {shown.get('source_workload')} to"
                f" {shown.get('destination_cluster')} {shown.get('destination_workload')},"
                f" {shown.get('destination_principal')}"
            )


@contextlib.contextmanager
def _divided(lab: Lab) -> Iterator[None]:
    """Gives each node its own view of the mesh, its ztunnel with it, and its gateway."""
    nodes.divide(lab.spec)
    gateways = [_gateway(node) for node in lab.spec.nodes]
    try:
        for node in lab.spec.nodes:
            _write(lab, node)
            nodes.add_gateway(lab.spec, _gateway(node), _gateway_ip(lab, node))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: _restart(lab, node), lab.spec.nodes))
        yield
    finally:
        for gateway in gateways:
            lab.children.end(gateway)
            remove_namespace(lab.spec.netns_name(gateway))
        nodes.unite(lab.spec)


def _restart(lab: Lab, node: str) -> None:
    gateway = _gateway(node)
    directory = lab.spec.node_dir(node)
    mesh = lab_mesh.options(lab.spec, directory / "mesh.yaml")
    ready = directory / "gateway.ready"
    argv = [sys.executable, "-m", "agent", "ztunnel", *mesh, "--gateway", f"gateways/{gateway}/{DEFAULT_ACCOUNT}",
            "--records", "", "--ready-file", str(ready)]  # fmt: skip
    started = lab.children.start(gateway, argv, lab.spec.netns_path(gateway), directory / "gateway.log")
    lab.nodes[node].replace_ztunnel(*mesh, "--network", node)
    await_ready(started, ready.exists, lab_mesh.READY_SECONDS, "listening")


def _gateway(node: str) -> str:
    return f"gw-{node}"


def _gateway_ip(lab: Lab, node: str) -> str:
    return f"192.0.2.{101 + lab.spec.nodes.index(node)}"


def _vip(lab: Lab, ref: str) -> str:
    return f"10.96.0.{10 + sorted(lab.pods.up()).index(ref)}"


def _write(lab: Lab, node: str) -> None:
    """Writes the node's view: its own pods, and for each service elsewhere an endpoint behind a gateway."""
    here = {"trustDomain": "cluster.local", "serviceAccount": DEFAULT_ACCOUNT, "protocol": "HBONE"}
    workloads: list[dict[str, Any]] = []
    services: list[dict[str, Any]] = []
    for ref, pod in lab.pods.up().items():
        if not pod.spec.enrolled:
            continue
        hostname = f"{pod.spec.name}.{pod.spec.namespace}.svc.cluster.local"
        port = PORTS[PodProgram.WEB]
        workloads.append({
            **here, **(_described(pod) if pod.spec.node == node else _behind(lab, pod)),
            "uid": f"lab//v1/Pod/{ref}", "name": pod.spec.name, "namespace": pod.spec.namespace,
            "network": pod.spec.node, "services": {f"{pod.spec.namespace}/{hostname}": {port: port}},
        })  # fmt: skip
        services.append({
            "name": pod.spec.name, "namespace": pod.spec.namespace, "hostname": hostname, "ports": {port: port},
            "vips": [f"{node}/{_vip(lab, ref)}"], "subjectAltNames": [_IDENTITY],
        })  # fmt: skip
    for each in lab.spec.nodes:
        workloads.append({
            **here, "uid": f"lab//v1/Pod/{_gateway(each)}", "name": _gateway(each), "namespace": "gateways",
            "network": each, "workloadIps": [_gateway_ip(lab, each)], "services": {},
        })  # fmt: skip
    text = yaml.safe_dump({"workloads": workloads, "services": services}, sort_keys=False)
    (lab.spec.node_dir(node) / "mesh.yaml").write_text(text)


def _described(pod: LabPod) -> dict[str, Any]:
    return {
        "workloadIps": [pod.ipv4, pod.ipv6], "workloadName": pod.spec.name, "workloadType": "deployment",
        "canonicalName": pod.spec.name, "canonicalRevision": "v1", "clusterId": f"cluster-{pod.spec.node}",
        "locality": {"region": "lab", "zone": pod.spec.node, "subzone": ""},
    }  # fmt: skip


def _behind(lab: Lab, pod: LabPod) -> dict[str, Any]:
    gateway = f"{pod.spec.node}/{_gateway_ip(lab, pod.spec.node)}"
    return {"workloadIps": [], "networkGateway": {"destination": gateway, "hboneMtlsPort": 15008}}


def _labels(lab: Lab, client: str, target: str, reporter: str) -> dict[str, str]:
    """Returns the labels that a ztunnel has counted the connection with; {} if it has counted none."""
    ztunnel = lab.nodes[lab.pods.require(client if reporter == "source" else target).spec.node].ztunnel
    assert ztunnel is not None
    wanted = {"reporter": reporter, "source_workload": client.partition("/")[2], "response_flags": "-"}

    def counted() -> dict[str, str]:
        text = page(ztunnel.pid, ZTUNNEL_STATS_PORT, "/metrics").decode()
        series = [dict(_LABEL.findall(match)) for match in _OPENED.findall(text)]
        return next((one for one in series if wanted.items() <= one.items()), {})

    return still(counted, bool)
