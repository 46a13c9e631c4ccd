"""Which of a pod's connections are from before a change, read from the kernel while there are any.

One sock_diag socket per pod, and only from `begin` until the last such connection has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.core.model.preexisting import Preexisting, Select, candidates, outside
from agent.core.model.sockets import CONNECTED, TcpSocket
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns


@dataclass(slots=True)
class _Pod:
    select: Select
    known: Preexisting = field(default_factory=Preexisting)
    before: list[TcpSocket] | None = None  # between begin and applied
    diag: SockDiag | None = None

    def read(self, target: PodNetns) -> list[TcpSocket]:
        # Family 6 is asked whatever the pod's switch for IPv6 says: its sockets may carry IPv4.
        if self.diag is None:
            self.diag = target.netns.call(SockDiag)
        return self.diag.both(CONNECTED)

    def learn(self, before: list[TcpSocket], after: Iterable[TcpSocket] = ()) -> None:
        # Added, not put in its place: a pass that is tried again begins when some rules are in already.
        self.known = Preexisting(self.known.cookies | outside(before, tuple(after), self.select).cookies)

    def close(self) -> None:
        diag = self.diag
        self.diag = None
        if diag is not None:
            diag.close()


class PreexistingConnections:
    """By pod UID. Called from worker threads, one pod at a time each; `as_note` and `restore` from anywhere."""

    def __init__(self, select: Select = candidates) -> None:
        """`select`: which of a pod's connections the change is about; those outside of ztunnel by default."""
        self._select = select
        self._pods: dict[str, _Pod] = {}

    def begin(self, uid: str, target: PodNetns) -> None:
        """Right before the first rules are applied. Raises KernelError.

        From here on `as_note` is what a later process needs if this one dies before it gets to `applied`.
        """
        pod = self._pods.setdefault(uid, _Pod(self._select))
        pod.before = pod.read(target)
        pod.learn(pod.before)

    def applied(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Right after: what is outside now. Without a `begin` as `remaining`. Raises KernelError."""
        pod = self._pods.get(uid)
        if pod is None or pod.before is None:
            return self.remaining(uid, target)
        after = pod.read(target)
        pod.learn(pod.before, after)
        pod.before = None
        left = pod.known.remaining(after, self._select)
        return left if left and len(left) == len(pod.known.cookies) else self.remaining(uid, target)

    def remaining(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Those that are left, read now; what is not there any more is forgotten. Raises KernelError.

        Without any this costs nothing.
        """
        pod = self._pods.get(uid)
        if pod is None:
            return ()
        left = {one.cookie: one for one in self._look(pod, target)}
        if len(left) < len(pod.known.cookies):
            # A dump may miss a socket; the rules that would break it must not come for that.
            left |= {one.cookie: one for one in self._look(pod, target)}
        pod.known = Preexisting(frozenset(left))
        if not left:
            self.forget(uid)
        return tuple(left.values())

    def forget(self, uid: str) -> None:
        """The pod is gone, or not captured any more."""
        pod = self._pods.pop(uid, None)
        if pod is not None:
            pod.close()

    def as_note(self, uid: str) -> list[int]:
        """What a later process needs for `restore`."""
        pod = self._pods.get(uid)
        return sorted(pod.known.cookies) if pod else []

    def restore(self, uid: str, cookies: Iterable[int]) -> None:
        """A predecessor's note; one that is too old does no harm, for the kernel uses no cookie twice."""
        if known := frozenset(cookies):
            self._pods[uid] = _Pod(self._select, Preexisting(known))

    def close(self) -> None:
        """At the end of the process."""
        for uid in list(self._pods):
            self.forget(uid)

    def _look(self, pod: _Pod, target: PodNetns) -> tuple[TcpSocket, ...]:
        return pod.known.remaining(pod.read(target), self._select) if pod.known else ()
