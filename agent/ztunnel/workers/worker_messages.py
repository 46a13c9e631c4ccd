# SPDX-License-Identifier: Apache-2.0
"""The messages between the supervisor and a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.zds.messages import Add
from agent.ztunnel.pod_server import Report

if TYPE_CHECKING:  # a node without a mesh loads none of them
    from agent.ztunnel.mesh.mesh_store import MeshDelta
    from agent.ztunnel.tls.contexts import Credentials
    from agent.ztunnel.tls.spiffe import SpiffeId


# To a worker


@dataclass(frozen=True, slots=True)
class AddPod:
    """Serve the pod. Its descriptors come along: the namespace, and the listeners in the order of Listeners.every."""

    add: Add
    hbone: bool
    dns: bool  # this worker reads the pod's queries over UDP


@dataclass(frozen=True, slots=True)
class DropPod:
    """End the pod."""

    uid: str


@dataclass(frozen=True, slots=True)
class MeshChanged:
    """Apply the change."""

    change: MeshDelta


@dataclass(frozen=True, slots=True)
class NewCredentials:
    """Use them for new connections."""

    credentials: Credentials


@dataclass(frozen=True, slots=True)
class SetLevels:
    """Log at these levels, by logger."""

    levels: dict[str, int]


@dataclass(frozen=True, slots=True)
class Ask:
    """Answer with Reported."""

    number: int


@dataclass(frozen=True, slots=True)
class StopListening:
    """Take no new connections, and end after the last one."""


@dataclass(frozen=True, slots=True)
class End:
    """End all connections, and yourself."""


# From a worker


@dataclass(frozen=True, slots=True)
class Started:
    """The pod is served, or `error` says why it is not."""

    uid: str
    error: str


@dataclass(frozen=True, slots=True)
class Want:
    """Connections of the identity wait for its credentials."""

    identity: SpiffeId


@dataclass(frozen=True, slots=True)
class Reported:
    """The counts that have changed since the last one, and with a `number` also the open connections."""

    number: int  # of Ask; 0 unasked
    report: Report


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines for the records, or for the access log."""

    access: bool
    text: bytes
