# SPDX-License-Identifier: Apache-2.0
"""Identifies the workload behind an address: pods of this node, and peers from a file or Kubernetes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field

from agent.core.model.pods import Pod

# Labels as istio.io/docs/reference/config/labels and kubernetes.io/docs/reference/labels-annotations-taints name them.
WORKLOAD_NAME = "service.istio.io/workload-name"
CANONICAL_NAME = "service.istio.io/canonical-name"
CANONICAL_REVISION = "service.istio.io/canonical-revision"
_RANDOM = re.compile(r"(.+)-[a-z0-9]{5}")  # what the API server appends to generateName
_ORDINAL = re.compile(r"(.+)-\d+")
_RUN = re.compile(r"(.+)-\d{8,10}")  # of a CronJob: the Job's name ends with minutes since the epoch


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload of a pod; "" is unknown. `pod` is the pod's name, for records alone: it makes no label set."""

    name: str = ""
    namespace: str = ""
    _: KW_ONLY
    service_account: str = ""
    app: str = ""
    version: str = ""
    cluster: str = ""
    canonical_service: str = ""
    canonical_revision: str = ""
    pod: str = field(default="", compare=False)

    def principal(self, trust_domain: str) -> str:
        """Its SPIFFE identity as Istio writes it in certificates; "" when it is not known."""
        if not self.namespace or not self.service_account:
            return ""
        return f"spiffe://{trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


@dataclass(frozen=True, slots=True)
class Service:
    """`host` is its whole name in DNS."""

    host: str
    name: str
    namespace: str


class Identities:
    """Workloads by address and services by (address, port), port 0 for all of them. Addresses are plain.

    Each half is replaced as a whole, so a reader on another thread sees the old or the new one.
    """

    def __init__(self, cluster: str = "Kubernetes", trust_domain: str = "cluster.local") -> None:
        self.cluster = cluster
        self.trust_domain = trust_domain
        self._local: Mapping[str, Workload] = {}
        self._peers: Mapping[str, Workload] = {}
        self._services: Mapping[tuple[str, int], Service] = {}

    def know_pods(self, pods: Iterable[Pod]) -> None:
        """Takes the pods of this node; they win over peers. Node addresses and ended pods have no workload."""
        local: dict[str, Workload] = {}
        for pod in pods:
            if not pod.host_network and not pod.terminal:
                workload = pod_workload(pod, self.cluster)
                local.update((address, workload) for address in pod.addresses)
        self._local = local

    def know_peers(self, workloads: Mapping[str, Workload], services: Mapping[tuple[str, int], Service]) -> None:
        self._peers = dict(workloads)
        self._services = dict(services)

    def workload(self, address: str) -> Workload | None:
        return self._local.get(address) or self._peers.get(address)

    def service(self, address: str, port: int) -> Service | None:
        return self._services.get((address, port)) or self._services.get((address, 0))


def pod_workload(pod: Pod, cluster: str) -> Workload:
    """Derives the workload from labels as istiod does: canonical name and revision fall back to Kubernetes' own labels.

    `app` and `version` fall back to the canonical ones, as in ztunnel's metrics (src/proxy/metrics.rs).
    """
    labels = pod.labels
    name = labels.get(WORKLOAD_NAME) or _owner(pod)
    service = labels.get(CANONICAL_NAME) or labels.get("app.kubernetes.io/name") or labels.get("app") or name
    revision = (
        labels.get(CANONICAL_REVISION) or labels.get("app.kubernetes.io/version") or labels.get("version") or "latest"
    )
    return Workload(
        name=name,
        namespace=pod.namespace,
        service_account=pod.service_account,
        app=labels.get("app") or service,
        version=labels.get("version") or revision,
        cluster=cluster,
        canonical_service=service,
        canonical_revision=revision,
        pod=pod.name,
    )


def _owner(pod: Pod) -> str:
    """Returns the owner of the pod, by the labels that each Kubernetes controller sets; else the pod's own name.

    Istio reads the owner from the API (kube/util.go, GetDeployMetaFromPod); on the node there are labels alone.
    """
    labels = pod.labels
    if suffix := labels.get("pod-template-hash"):
        owner = _without(_RANDOM, pod.name)
        return owner.removesuffix(f"-{suffix}") if owner.endswith(f"-{suffix}") else pod.name
    if suffix := labels.get("batch.kubernetes.io/job-name") or labels.get("job-name"):
        return _without(_RUN, suffix)
    if labels.get("statefulset.kubernetes.io/pod-name") == pod.name:
        return _without(_ORDINAL, pod.name)
    if "pod-template-generation" in labels:  # a DaemonSet's
        return _without(_RANDOM, pod.name)
    return pod.name


def _without(suffix: re.Pattern[str], name: str) -> str:
    match = suffix.fullmatch(name)
    return match[1] if match else name
