# SPDX-License-Identifier: Apache-2.0
"""Istio's ztunnel on a lab's node in place of the embedded one: its environment and its local file. Pure.

There is no istiod and, unless the environment has FAKE_CA (a build with the feature "testing") or CA_ADDRESS, no CA:
then workloads speak plain TCP, and ztunnel needs no certificates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from agent.core.names import DEFAULT_ACCOUNT
from agent.lab.lab_spec import PodSpec

LOCAL_FILE = "workloads.yaml"  # in a node's directory; read once, when ztunnel starts
# Settings of the agent. Istio's ztunnel asks the node's resolver, which knows no name of the lab.
SETTINGS: Final[Mapping[str, Any]] = {"dns_capture": False, "ztunnel_ports": ["15001", "15006", "15008"]}


def environment(directory: Path, node: str) -> dict[str, str]:
    return {
        "PROXY_MODE": "shared",
        "XDS_ADDRESS": "",
        "LOCAL_XDS_PATH": str(directory / LOCAL_FILE),
        "INPOD_UDS": str(directory / "ztunnel.sock"),
        "NODE_NAME": node,
    }


def has_certificates(given: Mapping[str, str]) -> bool:
    """Returns True if a ztunnel with these variables gets certificates signed."""
    return given.get("FAKE_CA") == "true" or "CA_ADDRESS" in given


def workloads(pods: Iterable[tuple[PodSpec, Sequence[str]]], *, hbone: bool) -> str:
    """Returns the local file: each pod with its addresses. ztunnel finds a pod by name, namespace and account."""
    listed: list[dict[str, Any]] = [
        {
            "uid": f"lab//v1/Pod/{spec.ref}",
            "name": spec.name,
            "namespace": spec.namespace,
            "serviceAccount": DEFAULT_ACCOUNT,
            "trustDomain": "cluster.local",
            "node": spec.node,
            "workloadIps": list(addresses),
            "workloadName": spec.name,
            "workloadType": "pod",
            "protocol": "HBONE" if hbone and spec.enrolled else "TCP",
            "services": {},
        }
        for spec, addresses in pods
    ]
    return yaml.safe_dump({"workloads": listed}, sort_keys=False)
