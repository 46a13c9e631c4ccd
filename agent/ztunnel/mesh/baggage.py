# SPDX-License-Identifier: Apache-2.0
"""The `baggage` header of HBONE, with which each end describes its workload. Pure.

The keys and their order are those of Istio's ztunnel; empty values are left out. What a peer sends is hostile: it is
bounded and never raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agent.ztunnel.mesh.mesh_model import Workload

MAX_LENGTH: Final = 4096  # characters of a header that is read
_MAX_VALUE: Final = 253  # characters of a value, as of a Kubernetes name
_KINDS: Final = ("deployment", "cronjob", "pod", "job")


@dataclass(frozen=True, slots=True, kw_only=True)
class Baggage:
    """A peer's description of its workload; "" for a missing field."""

    cluster_id: str = ""
    namespace: str = ""
    workload_type: str = ""
    workload_name: str = ""
    service_name: str = ""
    revision: str = ""
    region: str = ""
    zone: str = ""


_FIELDS: Final = {
    "k8s.cluster.name": "cluster_id",
    "k8s.namespace.name": "namespace",
    "service.name": "service_name",
    "service.version": "revision",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
}


def header(workload: Workload) -> str:
    """Returns the value of the header for a workload of this node."""
    kind = workload.workload_type.lower()
    pairs = (
        ("k8s.cluster.name", workload.cluster_id),
        ("k8s.namespace.name", workload.namespace),
        (f"k8s.{kind if kind in _KINDS else 'pod'}.name", workload.workload_name),
        ("service.name", workload.canonical_name),
        ("service.version", workload.canonical_revision),
        ("cloud.region", workload.locality.region),
        ("cloud.availability_zone", workload.locality.zone),
    )
    return ",".join(f"{key}={value}" for key, value in pairs if value)


def parse(value: str) -> Baggage:
    """Returns what the header says; the last one of equal keys counts, and what is too long or malformed is ignored."""
    if len(value) > MAX_LENGTH:
        return Baggage()
    fields: dict[str, str] = {}
    for pair in value.split(","):
        key, _, text = pair.strip().partition("=")
        text = text.partition(";")[0].strip()  # the properties of W3C baggage
        if not text or len(text) > _MAX_VALUE or not text.isprintable():
            continue
        if name := _FIELDS.get(key):
            fields[name] = text
        elif key.startswith("k8s.") and key.endswith(".name") and key[4:-5] in _KINDS:
            fields["workload_type"] = key[4:-5]
            fields["workload_name"] = text
    return Baggage(**fields)
