# SPDX-License-Identifier: Apache-2.0
"""The peers file: workloads behind addresses of other nodes, where there is no API server. Parsing is pure.

workloads:
  - addresses: [10.0.1.5]
    namespace: shop
    name: web-6d4cf56db6-x2x9p     # the pod's
    workload, service_account, app, version, cluster, labels: optional; what is missing follows from labels as of a pod
services:
  - addresses: [10.96.0.10]
    namespace: shop
    name: web
    host: web.shop.svc.cluster.local   # this, if it is missing
    ports: [80, 443]                   # all, if they are missing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.core.model.pods import LABEL, Pod
from agent.core.yamlnodes import YamlMapping, document, scalar
from agent.flows.identity import WORKLOAD_NAME, Service, Workload, pod_workload

_WORKLOAD = {
    "addresses", "namespace", "name", "workload", "service_account", "app", "version", "cluster", "labels",
}  # fmt: skip
_SERVICE = {"addresses", "namespace", "name", "host", "ports"}


@dataclass(frozen=True, slots=True)
class RemoteWorkloads:
    """The content for Identities: by address, and by (address, port) with port 0 for all."""

    workloads: Mapping[str, Workload] = field(default_factory=dict)
    services: Mapping[tuple[str, int], Service] = field(default_factory=dict)


def parse(text: str, source: str, cluster: str = "") -> RemoteWorkloads:
    """Parses a file of remote workloads; `cluster` is that of workloads which name none.

    Raises SettingsError as "place:line: key: what is wrong"; one error refuses the whole file.
    """
    top = document(text, source, {"workloads", "services"})
    if top is None:
        return RemoteWorkloads()
    workloads: dict[str, Workload] = {}
    for one in top.entries("workloads", _WORKLOAD):
        workload = _workload(one, cluster)
        for address in _addresses(one):
            if address in workloads:
                raise one.error("addresses", f"{address} is another workload's too")
            workloads[address] = workload
    services: dict[tuple[str, int], Service] = {}
    for one in top.entries("services", _SERVICE):
        service = _service(one)
        ports = _ports(one)
        for where in ((address, port) for address in _addresses(one) for port in ports):
            if where in services:
                raise one.error("addresses", f"{where[0]} port {where[1] or 'any'} is another service's too")
            services[where] = service
    return RemoteWorkloads(workloads, services)


def _workload(one: YamlMapping, cluster: str) -> Workload:
    given = {
        WORKLOAD_NAME: one.text("workload"),
        "app": one.text("app"),
        "version": one.text("version"),
    }
    pod = Pod(
        uid="",
        namespace=_name(one, "namespace"),
        name=_name(one, "name"),
        service_account=one.text("service_account"),
        labels={**one.texts("labels"), **{key: value for key, value in given.items() if value}},
    )
    return pod_workload(pod, one.text("cluster") or cluster)


def _service(one: YamlMapping) -> Service:
    namespace, name = _name(one, "namespace"), _name(one, "name")
    return Service(one.text("host") or f"{name}.{namespace}.svc.cluster.local", name, namespace)


def _name(one: YamlMapping, key: str) -> str:
    name = one.text(key)
    if not LABEL.fullmatch(name):
        raise one.error(key, "is missing or not a Kubernetes name")
    return name


def _addresses(one: YamlMapping) -> list[str]:
    addresses = one.addresses("addresses")
    if not addresses:
        raise one.error("addresses", "is missing or empty")
    return list(dict.fromkeys(addresses))


def _ports(one: YamlMapping) -> list[int]:
    texts = [scalar(item, one.source, "ports") for item in one.items("ports")]
    for text in texts:
        if not (text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) < 65536):
            raise one.error("ports", f"{text!r} is not a port")
    return [int(text) for text in dict.fromkeys(texts)] or [0]
