"""What the reconciler needs of its surroundings; the composition root brings the real ones, tests fakes."""

from __future__ import annotations

from typing import Protocol

from agent.core.pods import Pod
from agent.kernel.podnetns import PodNetns


class Namespaces(Protocol):
    """Finds and keeps each pod's namespace."""

    def resolve(self, pod: Pod) -> PodNetns:
        """The proven namespace of the pod. Raises NetnsError; blocking."""

    def remember(self, pod: Pod, *, captured: bool) -> None:
        """Notes the pod on disk, with a pin on its namespace while it is captured; blocking."""

    def was_captured(self, uid: str) -> bool:
        """Whether we have, or may have, rules in this pod."""

    def release(self, uid: str) -> None:
        """Forgets the pod: handles closed, pin and note removed; blocking."""


class Publisher(Protocol):
    """Hands pods to ztunnel."""

    async def publish(self, pod: Pod, target: PodNetns) -> None:
        """Returns when a live ztunnel has acknowledged the pod. Raises ZtunnelError."""

    async def withdraw(self, uid: str) -> None:
        """Tells every ztunnel that the pod is gone; never fails."""


class Watcher(Protocol):
    """Notices changes in a pod's namespace and wakes the reconciler."""

    def watch(self, uid: str, target: PodNetns) -> None: ...

    def unwatch(self, uid: str) -> None: ...


class Journal(Protocol):
    """Is told what happened, for logs and metrics."""

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        """A plan was carried out; `cause` names who made it necessary, "" when the want itself changed."""

    def failed(self, pod: Pod, error: Exception) -> None: ...

    def passed(self, pod: Pod, seconds: float) -> None: ...
