"""What the reconciler needs of its surroundings; the composition root brings the real ones, tests fakes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from agent.core.model.listeners import PortListeners
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.policy.canary import ProbeResult
from agent.kernel.pod_netns import PodNetns


class NamespaceRegistry(Protocol):
    """Finds and keeps each pod's namespace."""

    def resolve(self, pod: Pod) -> PodNetns:
        """The proven namespace of the pod. Raises NetnsError; blocking."""

    def opened(self, uid: str) -> PodNetns | None:
        """The pod's namespace as it was resolved last, without proving it again."""

    def occupied(self, target: PodNetns) -> bool:
        """Whether a process is in the namespace; blocking. Raises KernelError."""

    def dead(self, cookies: Collection[int]) -> frozenset[int]:
        """Those of the namespaces' cookies that belong to no pod and to nothing that lives; blocking."""

    def remember(
        self, pod: Pod, *, captured: bool, preexisting: tuple[int, ...] = (), preswitch: tuple[int, ...] = ()
    ) -> None:
        """Notes the pod on disk, with a pin on its namespace while it is captured; blocking.

        `preexisting` are the sockets' cookies of connections that are older than its enrolment, `preswitch` those of
        connections that are older than a change between NAT and eBPF.
        """

    def is_new(self, pod: Pod) -> bool:
        """Whether the pod's sandbox is just being made: a CNI ADD announced it, and nothing is noted of it."""

    def was_captured(self, uid: str) -> bool:
        """Whether we have, or may have, rules in this pod."""

    def release(self, uid: str) -> None:
        """Forgets the pod: handles closed, pin and note removed; blocking."""


class PreexistingConnections(Protocol):
    """Knows which of a pod's connections are older than a change, such as its enrolment; blocking."""

    def begin(self, uid: str, target: PodNetns) -> None:
        """Right before it: when nothing is applied yet."""

    def applied(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Right after: those that are outside (or carried on) now."""

    def remaining(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Those that are left."""

    def forget(self, uid: str) -> None: ...

    def as_note(self, uid: str) -> list[int]:
        """What a later process needs to know them again."""


class NonTcpCounter(Protocol):
    """Keeps totals of what passes beside ztunnel; blocking."""

    def count(self, uid: str, target: PodNetns, want: Redirect, *, now: bool = False) -> None:
        """Before `want` is made true; `now` even if it was read lately."""

    def forget(self, uid: str) -> None: ...


class Accounting(Protocol):
    """Keeps account of each pod's connections; blocking, and never fails: capture does not depend on it."""

    def enrol(self, pod: Pod, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        """Before `want` is made true (`captured` False) and after. True when it wants to be called again soon."""

    def watch(self, pod: Pod, target: PodNetns) -> None:
        """What is left to do once `enrol` has said False; takes long, so nobody should wait for it."""

    def returned(self, target: PodNetns) -> tuple[str, ...]:
        """A remark (core.plan.Foreign) where ztunnel's own connections lately came back to it."""

    def release(self, uid: str, target: PodNetns | None = None) -> None: ...


class StaleFlows(Protocol):
    """Removes conntrack entries that have missed the end of their connection; blocking, and never fails."""

    def forget(self, target: PodNetns, *, changed: bool) -> bool:
        """With the rules in place; `changed` if they were not before. True when it has to be called again soon."""


class HostLoop(Protocol):
    """The exemption of the node's probes, which holds the addresses of enrolled pods."""

    def claim(self, uid: str, addresses: Iterable[str]) -> None: ...

    def release(self, uid: str) -> None: ...

    async def settled(self) -> object:
        """Returns after a pass that began after this call."""


class ProbeCanary(Protocol):
    """The canary: connects to newly enrolled pods as the node's probes do."""

    def enrolled(self, uid: str) -> None: ...

    def due(self, uid: str) -> bool: ...

    def done(self, uid: str, finding: ProbeResult) -> None: ...

    def forget(self, uid: str) -> None: ...

    async def probe(self, addresses: Sequence[str], target: PodNetns, *, ipv6: bool) -> ProbeResult: ...


class ZtunnelPublisher(Protocol):
    """Hands pods to ztunnel."""

    async def publish(self, pod: Pod, target: PodNetns) -> None:
        """Returns when a live ztunnel has acknowledged the pod. Raises ZtunnelError."""

    async def withdraw(self, uid: str) -> None:
        """Tells every ztunnel that the pod is gone; never fails."""


class ZtunnelPorts(Protocol):
    """Sees who listens on ztunnel's ports; blocking."""

    def heard(self, target: PodNetns) -> PortListeners:
        """Now. Raises KernelError."""

    def last(self, target: PodNetns) -> PortListeners:
        """As heard last, or now. Raises KernelError."""

    def astray(self, target: PodNetns, want: Redirect, *, by_socket: bool) -> tuple[str, ...]:
        """In words, new connections of the pod that do not reach ztunnel though `want` is applied; blocking.

        `by_socket`: backend ebpf captures.
        """


class ZtunnelConnections(Protocol):
    """Knows the connections that ztunnel carries for a pod; blocking."""

    def there(self, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Both ends of each, as far as they are in the pod. Raises KernelError."""

    def reset(self, target: PodNetns) -> None:
        """Ends them so that both ends hear of it. Raises KernelError."""


class DriftWatcher(Protocol):
    """Notices changes in a pod's namespace and wakes the reconciler."""

    def watch(self, uid: str, target: PodNetns) -> None: ...

    def unwatch(self, uid: str) -> None: ...


class Journal(Protocol):
    """Is told what happened, for logs and metrics."""

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        """A plan was carried out; `cause` names who made it necessary, "" when the want itself changed."""

    def failed(self, pod: Pod, error: Exception) -> None: ...

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        """Somebody keeps undoing our repairs; `remarks` tell of the foreign rules that are there."""

    def probed(self, pod: Pod, finding: ProbeResult) -> None:
        """The canary came back with an answer."""

    def passed(self, pod: Pod, seconds: float) -> None: ...
