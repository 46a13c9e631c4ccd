# SPDX-License-Identifier: Apache-2.0
"""The input of CNI plugins from a container runtime, as pure values: configuration list, stdin, environment.

Facts: CNI specification 1.1.0, sections 2 (environment) and 3 (deriving the execution configuration).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.lab.lab_spec import LabSpec

ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"
IFNAME: Final = "eth0"
# Debian's containernetworking-plugins 1.1.1 support versions up to this one.
CNI_VERSION: Final = "1.0.0"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One container's interface, as the runtime knows it."""

    container_id: str
    netns: str  # a path; empty on the second DEL, when the namespace is gone
    namespace: str
    name: str
    uid: str
    annotations: Mapping[str, str]


def conflist(spec: LabSpec, node: str, *, sluice: bool = True) -> Json:
    """Returns the node's network configuration list: ptp with host-local, dual stack, then Sluice chained behind."""
    directory = spec.node_dir(node)
    ptp = {
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "dataDir": str(address_dir(spec, node).parent),
            "ranges": [[{"subnet": cidr}] for cidr in spec.pod_cidrs(node)],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }
    chained = {
        "type": "sluice-cni",
        "socket": str(directory / "cni.sock"),
        "capabilities": {ANNOTATIONS: True, "dns": True},
        "excludeNamespaces": ["kube-system"],
    }
    return {"cniVersion": CNI_VERSION, "name": "lab", "plugins": [ptp, chained] if sluice else [ptp]}


def address_dir(spec: LabSpec, node: str) -> Path:
    """Returns the directory in which host-local keeps a file per address in use, named by the address.

    Its last part is the name of the network.
    """
    return spec.node_dir(node) / "cni" / "host-local" / "lab"


def plugin_input(network: Json, plugin: Json, attachment: Attachment, previous: Json | None) -> Json:
    """Returns the execution configuration of one plugin, which it reads on stdin.

    `capabilities` are the plugin's requests to the runtime: they are removed, and the supported ones become
    `runtimeConfig`.
    """
    config = {key: value for key, value in plugin.items() if key != "capabilities"}
    config |= {"cniVersion": network["cniVersion"], "name": network["name"]}
    if plugin.get("capabilities", {}).get(ANNOTATIONS):
        config["runtimeConfig"] = {ANNOTATIONS: dict(attachment.annotations)}
    if previous is not None:
        config["prevResult"] = previous
    return config


def environment(verb: str, path: Sequence[Path], attachment: Attachment, shuffle: random.Random) -> dict[str, str]:
    """Returns the variables of one call. CNI_ARGS are in random order, because runtimes build them from maps."""
    args = [
        "IgnoreUnknown=1",
        f"K8S_POD_NAMESPACE={attachment.namespace}",
        f"K8S_POD_NAME={attachment.name}",
        f"K8S_POD_INFRA_CONTAINER_ID={attachment.container_id}",
        f"K8S_POD_UID={attachment.uid}",
    ]
    shuffle.shuffle(args)
    return {
        "CNI_COMMAND": verb,
        "CNI_PATH": ":".join(map(str, path)),
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": IFNAME,
        "CNI_ARGS": ";".join(args),
    }
