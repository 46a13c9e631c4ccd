# SPDX-License-Identifier: Apache-2.0
"""The one interface of all layers, of pods and of the node. Verifying is an empty plan; removal is applying nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from agent.core.model.plan import Plan
from agent.core.model.redirect import Redirect
from agent.kernel.pod_netns import PodNetns

Target_contra = TypeVar("Target_contra", contravariant=True)
Want_contra = TypeVar("Want_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Support:
    """Result of a probe: whether this node can do it; if not, `missing` says what is missing and how to get it."""

    ok: bool
    missing: str = ""
    remarks: tuple[str, ...] = ()


class Layer(Protocol[Target_contra, Want_contra]):
    """A part of a mechanism that holds its state in a target. What `read` returns is opaque to all callers."""

    name: str

    def probe(self) -> Support:
        """Tries whether this node supports the layer, in a namespace of its own. Leaves nothing behind."""

    def read(self, target: Target_contra) -> Any:
        """Returns Sluice's state in the kernel; makes nothing and loads nothing. Raises KernelError."""

    def plan(self, want: Want_contra | None, have: Any) -> Plan[Any]:
        """Returns the changes, pure; `want` None removes all of Sluice's state."""

    def apply(self, target: Target_contra, plan: Plan[Any]) -> None:
        """Does it, atomically. Raises StaleError when the kernel's state is not the one planned for."""


class PodLayer(Layer[PodNetns, Redirect], Protocol):
    """A layer in a pod's namespace.

    `outlives`: what it holds of a pod is kept by the node and does not go with the pod's namespace (see Lasting).
    """

    outlives: bool


class Lasting(PodLayer, Protocol):
    """A layer with state that `outlives` the pod. Connections that it captured need nothing of it."""

    def orphans(self, known: Iterable[PodNetns]) -> Sequence[Any]:
        """Units for `read` and `apply` of what the node holds and what is of none of the `known` pods.

        One of a pod has the `cookie` of its namespace; one without is of the node itself. Raises KernelError.
        """

    def waits(self, target: PodNetns) -> bool:
        """True if it could only refuse connections to the pod until ztunnel is there. Raises KernelError."""


def lasting(layers: Iterable[PodLayer]) -> tuple[Lasting, ...]:
    """Returns the layers that outlive their pods."""
    return tuple(cast(Lasting, layer) for layer in layers if layer.outlives)
