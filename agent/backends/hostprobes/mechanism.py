# SPDX-License-Identifier: Apache-2.0
"""Interface of all mechanisms of the probe exemption: the five verbs, for the host instead of a pod."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from agent.backends.base import Support
from agent.backends.hostprobes.want import HostProbes
from agent.core.model.plan import Plan
from agent.kernel.host_netns import HostNetns


class HostMechanism(Protocol):
    """The counterpart of backends.base.Backend. `Have` is what `read` returned, opaque to all callers."""

    name: str

    def probe(self) -> Support:
        """Can this node do it. Tries in a namespace of its own and leaves nothing behind."""

    def targets(self, desired: Mapping[HostNetns, HostProbes | None]) -> Mapping[HostNetns, HostProbes | None]:
        """Splits the desired state into units that settle alone; there is one host."""

    def read(self, target: HostNetns) -> Any:
        """Returns Sluice's state in the kernel; makes nothing and loads nothing."""

    def plan(self, want: HostProbes | None, have: Any) -> Plan[Any]:
        """Returns the changes, pure; `want` None removes all of Sluice's state."""

    def apply(self, target: HostNetns, plan: Plan[Any]) -> None:
        """Does it. Raises StaleError when the kernel's state is not the one planned for."""
