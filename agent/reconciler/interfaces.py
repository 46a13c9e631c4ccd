# SPDX-License-Identifier: Apache-2.0
"""The interfaces that the reconciler uses; the composition root passes the real parts, tests pass fakes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from agent.core.model.pods import Pod
from agent.core.model.port_listeners import PortListeners
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.model.status import Status
from agent.core.policy.accept_queue import QueueReading
from agent.core.policy.canary import ProbeResult
from agent.kernel.pod_netns import PodNetns


class NamespaceRegistry(Protocol):
    """Finds and keeps each pod's namespace."""

    def resolve(self, pod: Pod) -> PodNetns:
        """Returns the proven namespace of the pod. Raises NetnsError; blocking."""

    def opened(self, uid: str) -> PodNetns | None:
        """Returns the pod's namespace as resolved last, without proving it again."""

    def occupied(self, target: PodNetns) -> bool:
        """Returns True if a process is in the namespace; blocking. Raises KernelError."""

    def dead(self, cookies: Collection[int]) -> frozenset[int]:
        """Returns the cookies of namespaces that belong to no pod and to no process or mount; blocking."""

    def remember(
        self, pod: Pod, *, captured: bool, preexisting: tuple[int, ...] = (), preswitch: tuple[int, ...] = ()
    ) -> None:
        """Notes the pod on disk, with a pin on its namespace while it is captured; blocking.

        `preexisting` are the sockets' cookies of connections that are older than its enrolment, `preswitch` those of
        connections that are older than a change between NAT and eBPF.
        """

    def is_new(self, pod: Pod) -> bool:
        """Returns True if the pod's sandbox is being created: a CNI ADD announced it, and there is no note."""

    def was_captured(self, uid: str) -> bool:
        """Returns True if there are, or may be, rules of Sluice in this pod."""

    def release(self, uid: str) -> None:
        """Forgets the pod: closes handles, removes pin and note; blocking."""


class PreexistingConnections(Protocol):
    """Knows the connections of a pod that are older than a change, such as its enrolment; blocking."""

    def begin(self, uid: str, target: PodNetns) -> None:
        """Lists connections right before the change, when nothing is applied yet."""

    def applied(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Returns the pre-existing connections right after the change."""

    def remaining(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Returns the pre-existing connections that still live."""

    def forget(self, uid: str) -> None: ...

    def as_note(self, uid: str) -> list[int]:
        """Returns their cookies, by which a later process recognises them."""


class NonTcpCounter(Protocol):
    """Keeps totals of traffic that is neither TCP nor captured DNS; blocking."""

    def count(self, uid: str, target: PodNetns, want: Redirect, *, now: bool = False) -> None:
        """Reads the counters before `want` is applied; with `now` even if they were read recently."""

    def forget(self, uid: str) -> None: ...


class Accounting(Protocol):
    """Accounts for each pod's connections; blocking, and never fails: capture does not depend on it."""

    def enrol(self, pod: Pod, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        """Accounts for the pod; called before `want` is applied (`captured` False) and after. True: call again soon."""

    def watch(self, pod: Pod, target: PodNetns) -> None:
        """Does the rest after `enrol` has returned False; takes long, so no pod may wait for it."""

    def returned(self, target: PodNetns) -> tuple[str, ...]:
        """Returns a remark (core.model.plan.Foreign) if ztunnel's own connections recently came back to it."""

    def release(self, uid: str, target: PodNetns | None = None) -> None: ...


class StaleFlows(Protocol):
    """Removes conntrack entries that have missed the end of their connection; blocking, and never fails."""

    def forget(self, target: PodNetns, *, changed: bool) -> bool:
        """Deletes stale flows, with the rules in place. `changed`: they were not before. True: call again soon."""


class HostLoop(Protocol):
    """Maintains the exemption of the node's probes for the addresses of enrolled pods."""

    def claim(self, uid: str, addresses: Iterable[str]) -> None: ...

    def release(self, uid: str) -> None: ...

    async def settled(self) -> object:
        """Returns after a pass that began after this call."""


class ProbeCanary(Protocol):
    """Connects to newly enrolled pods as the node's probes do."""

    def enrolled(self, uid: str) -> None: ...

    def due(self, uid: str) -> bool: ...

    def done(self, uid: str, result: ProbeResult) -> None: ...

    def forget(self, uid: str) -> None: ...

    async def probe(self, addresses: Sequence[str], target: PodNetns, *, ipv6: bool) -> ProbeResult: ...


class ZtunnelPublisher(Protocol):
    """Publishes pods to ztunnel."""

    async def publish(self, pod: Pod, target: PodNetns) -> None:
        """Returns when a live ztunnel has acknowledged the pod. Raises ZtunnelError."""

    async def withdraw(self, uid: str) -> None:
        """Withdraws the pod from every ztunnel; never fails."""


class ZtunnelPorts(Protocol):
    """Reads the listeners on ztunnel's ports; blocking."""

    def heard(self, target: PodNetns) -> PortListeners:
        """Returns the present listeners. Raises KernelError."""

    def last(self, target: PodNetns) -> PortListeners:
        """Returns the listeners as last read, or reads them. Raises KernelError."""

    def waiting(self, target: PodNetns) -> QueueReading:
        """Returns the connections that wait for ztunnel to accept them. Raises KernelError."""

    def astray(self, target: PodNetns, want: Redirect, *, by_socket: bool) -> tuple[str, ...]:
        """Describes new connections of the pod that do not reach ztunnel although `want` is applied; blocking.

        `by_socket`: backend ebpf captures.
        """


class ZtunnelConnections(Protocol):
    """Knows the connections that ztunnel proxies for a pod; blocking."""

    def there(self, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Returns both ends of each, if they are in the pod. Raises KernelError."""

    def reset(self, target: PodNetns) -> None:
        """Resets them, so that both ends notice. Raises KernelError."""


class DriftWatcher(Protocol):
    """Notices changes in a pod's namespace and wakes the reconciler."""

    def watch(self, uid: str, target: PodNetns, wake: Callable[[str, str], None]) -> None:
        """Calls `wake` with the UID and the cause of each change."""

    def unwatch(self, uid: str) -> None: ...


class Journal(Protocol):
    """Receives events, for logs and metrics."""

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        """Records an applied plan; `cause` names the process that made it necessary, "" if the want changed."""

    def failed(self, pod: Pod, error: Exception) -> None: ...

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        """Records a rule conflict: a process keeps reverting repairs; `remarks` describe the foreign rules."""

    def probed(self, pod: Pod, result: ProbeResult) -> None:
        """Records the result of the canary."""

    def stalled(self, pod: Pod, *, over: bool) -> None:
        """Records that ztunnel does not accept connections of the pod, or accepts them again (`over`)."""

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        """Records the end of a pass, after which the pod has this status."""
