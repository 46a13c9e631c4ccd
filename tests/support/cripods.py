# SPDX-License-Identifier: Apache-2.0
"""Pods as the kubelet tells a runtime of them, and what the runtime made of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from support.cri import Fields, sandbox_config
from support.crihost import RESOLVER

from agent.core.names import DATAPLANE_MODE


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

    def config(self, cgroup: str) -> Fields:
        """PodSandboxConfig."""
        mode = {DATAPLANE_MODE: "ambient"} if self.enrolled else {}
        return sandbox_config(
            self.namespace, self.name, self.uid, cgroup, attempt=self.attempt, labels={"app": self.name},
            annotations={**mode, **self.annotations}, resolver=RESOLVER, host_network=self.host_network,
        )  # fmt: skip


@dataclass(frozen=True)
class Sandbox:
    """`netns` is a path on the node."""

    pod: CriPod
    id: str
    ip: str
    netns: str
