# SPDX-License-Identifier: Apache-2.0
"""The one interface of all mechanisms. Verifying is an empty plan; removal is applying nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from agent.core.model.plan import Plan
from agent.core.model.redirect import Redirect
from agent.kernel.pod_netns import PodNetns


@dataclass(frozen=True, slots=True)
class Support:
    """Result of a probe: whether this node can do it; if not, `missing` says what is missing and how to get it."""

    ok: bool
    missing: str = ""
    remarks: tuple[str, ...] = ()


class Backend(Protocol):
    """A mechanism. `Have` is what `read` returned, opaque to everybody else.

    `outlives`: what it holds of a pod is kept by the node and does not go with the pod's namespace (see Lasting).
    """

    name: str
    outlives: bool

    def probe(self) -> Support:
        """Can this node do it. Tries in a namespace of its own and leaves nothing behind."""

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[Any, Redirect | None]:
        """Splits the desired state into units that settle alone; here each pod's namespace."""

    def read(self, target: Any) -> Any:
        """Returns Sluice's state in the kernel."""

    def plan(self, want: Redirect | None, have: Any) -> Plan[Any]:
        """Returns the changes, pure; `want` None removes all of Sluice's state."""

    def apply(self, target: Any, plan: Plan[Any]) -> None:
        """Does it, atomically. Raises StaleError when the kernel's state is not the one planned for."""


class Lasting(Backend, Protocol):
    """A mechanism with state that `outlives` the pod. Connections that it captured need nothing of it."""

    def orphans(self, known: Iterable[PodNetns]) -> Sequence[Any]:
        """Units for `read` and `apply` of what the node holds and what is of none of the `known` pods.

        One of a pod has the `cookie` of its namespace; one without is of the node itself. Raises KernelError.
        """

    def waits(self, target: PodNetns) -> bool:
        """True if it could only refuse connections to the pod until ztunnel is there. Raises KernelError."""


def lasting(layers: Iterable[Backend]) -> tuple[Lasting, ...]:
    """Returns the layers that outlive their pods."""
    return tuple(cast(Lasting, layer) for layer in layers if layer.outlives)
