"""Pods as the kubelet tells a runtime of them, and what the runtime made of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from support.cri import Fields
from support.crihost import RESOLVER

from agent.core.names import DATAPLANE_MODE

POD, CONTAINER, NODE = 0, 1, 2  # NamespaceMode of cri-api


@dataclass(frozen=True)
class CriPod:
    """A pod as the kubelet tells the runtime of it; a further attempt is a further sandbox of the same pod."""

    name: str
    namespace: str = "shop"
    enrolled: bool = True
    host_network: bool = False
    attempt: int = 0
    annotations: Mapping[str, str] = field(default_factory=dict)
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def again(self) -> CriPod:
        return replace(self, attempt=self.attempt + 1)

    def namespaces(self) -> Fields:
        """NamespaceOption, as the kubelet has it by default: a PID namespace for each container."""
        return [(1, NODE if self.host_network else POD), (2, CONTAINER)]

    def config(self, cgroup: str) -> Fields:
        """PodSandboxConfig."""
        mode = {DATAPLANE_MODE: "ambient"} if self.enrolled else {}
        linux = [(1, f"{cgroup}/pod{self.uid}"), (2, [(1, self.namespaces())])]
        metadata = [(1, self.name), (2, self.uid), (3, self.namespace), (4, self.attempt)]
        return [
            (1, metadata), (2, "" if self.host_network else self.name),
            (4, [(1, RESOLVER)]), (6, {"app": self.name}), (7, {**mode, **self.annotations}), (8, linux),
        ]  # fmt: skip


@dataclass(frozen=True)
class Sandbox:
    """`netns` is a path on the node."""

    pod: CriPod
    id: str
    ip: str
    netns: str
