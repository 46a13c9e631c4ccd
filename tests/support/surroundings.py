# SPDX-License-Identifier: Apache-2.0
"""What the agent knows around a pod, for the admin API without an agent."""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.errors import KernelError
from agent.core.model.port_listeners import PortListeners
from agent.export.explaining import ExplainContext
from agent.reconciler.host_loop import HostStatus
from agent.zds.messages import Add


class Surroundings:
    """Everything is right until a script says otherwise."""

    def __init__(self) -> None:
        self.acknowledged, self.heard, self.failure = True, PortListeners(), False
        self.host = HostStatus("nftables", ok=True, members=1)

    def ask_heard(self, uid: str) -> PortListeners | None:
        if self.failure:
            raise KernelError("sock_diag", 12, "no memory")
        return self.heard

    def around(self, places: Mapping[str, str]) -> ExplainContext:
        return ExplainContext(
            acknowledged=lambda uid: self.acknowledged,
            sent=lambda uid: Add(uid, "web", "shop", "robot"),
            heard=self.ask_heard,
            host=lambda: self.host,
            exempt=lambda uid: ("10.0.0.2",),
            place=lambda uid: "/proc/7/ns/net",
            programs=lambda uid: ("BPF program pass (number 7) is attached to eth0 (XDP)",),
            places=places,
        )
