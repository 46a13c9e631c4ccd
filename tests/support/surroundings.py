# SPDX-License-Identifier: Apache-2.0
"""What the agent knows around a pod, for the admin API without an agent."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from agent.core.errors import KernelError
from agent.core.model.port_listeners import PortListeners
from agent.export.explaining import ExplainContext
from agent.reconciler.host_loop import HostStatus
from agent.zds.messages import Add

PROGRAM = "BPF program pass (number 7) is attached to eth0 (XDP)"


class Surroundings:
    """Everything is right until a script says otherwise. Patch `pathprograms.others`, which asks the kernel."""

    def __init__(self) -> None:
        self.acknowledged, self.heard, self.failure = True, PortListeners(), False
        self.host = HostStatus("nftables", ok=True, members=1)

    def last(self, target: object) -> PortListeners:
        if self.failure:
            raise KernelError("sock_diag", 12, "no memory")
        return self.heard

    def around(self, places: Mapping[str, str]) -> ExplainContext:
        target = SimpleNamespace(netns=SimpleNamespace(origin="/proc/7/ns/net"))
        parts: dict[str, Any] = {
            "zds": SimpleNamespace(
                acknowledged=lambda uid: self.acknowledged, sent=lambda uid: Add(uid, "web", "shop", "robot")
            ),
            "namespaces": SimpleNamespace(opened=lambda uid: target),
            "listening": self,
            "host": _Host(self),
        }
        return ExplainContext(**parts, origins=places)


class _Host:
    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    @property
    def status(self) -> HostStatus:
        return self._surroundings.host

    def claimed(self, uid: str) -> tuple[str, ...]:
        return ("10.0.0.2",)
