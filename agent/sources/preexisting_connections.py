# SPDX-License-Identifier: Apache-2.0
"""Tracks the connections of a pod that are older than a change, read from the kernel while there are any.

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
    begun: bool = False  # between begin and applied
    diag: SockDiag | None = None

    def read(self, target: PodNetns) -> list[TcpSocket]:
        # Family 6 is read even if IPv6 is off in the pod: such sockets may carry IPv4.
        if self.diag is None:
            self.diag = target.netns.call(SockDiag)
        return self.diag.both(CONNECTED)

    def learn(self, before: list[TcpSocket], after: Iterable[TcpSocket] = ()) -> None:
        # Added, not replaced: a retried pass begins when some rules are applied already.
        self.known = Preexisting(self.known.cookies | outside(before, tuple(after), self.select).cookies)

    def close(self) -> None:
        diag = self.diag
        self.diag = None
        if diag is not None:
            diag.close()


class PreexistingConnections:
    """Tracks by pod UID. For worker threads, one pod at a time each; `as_note` and `restore` for any thread."""

    def __init__(self, select: Select = candidates) -> None:
        """Takes `select`, which picks the affected connections; by default those not proxied by ztunnel."""
        self._select = select
        self._pods: dict[str, _Pod] = {}

    def begin(self, uid: str, target: PodNetns) -> None:
        """Lists connections right before the first rules are applied. Raises KernelError.

        From here on `as_note` serves a later process if this one dies before `applied`.
        """
        pod = self._pods.setdefault(uid, _Pod(self._select))
        pod.learn(pod.read(target))
        pod.begun = True

    def applied(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Returns the pre-existing ones right after the rules; without `begin` like `remaining`. Raises KernelError."""
        pod = self._pods.get(uid)
        if pod is None or not pod.begun:
            return self.remaining(uid, target)
        # A dump is not a moment: on a busy machine it takes 100 ms and more. Of a handshake that ends meanwhile it may
        # show the client's end alone, as if ztunnel did not have the connection. The next dump shows both.
        first, second = pod.read(target), pod.read(target)
        pod.learn(first, second)
        pod.begun = False
        return self._keep(uid, pod, [pod.known.remaining(now, self._select) for now in (first, second)])

    def remaining(self, uid: str, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Reads those that still live and forgets the others. Raises KernelError. Costs nothing without any."""
        pod = self._pods.get(uid)
        if pod is None:
            return ()
        looks = [self._look(pod, target)]
        if len(looks[0]) < len(pod.known.cookies):
            # A dump may miss a socket, and rules that would break it must not be applied because of that.
            looks.append(self._look(pod, target))
        return self._keep(uid, pod, looks)

    def _keep(self, uid: str, pod: _Pod, looks: Iterable[tuple[TcpSocket, ...]]) -> tuple[TcpSocket, ...]:
        left = {one.cookie: one for look in looks for one in look}
        pod.known = Preexisting(frozenset(left))
        if not left:
            self.forget(uid)
        return tuple(left.values())

    def forget(self, uid: str) -> None:
        """Forgets a pod that is gone or no longer captured."""
        pod = self._pods.pop(uid, None)
        if pod is not None:
            pod.close()

    def as_note(self, uid: str) -> list[int]:
        """Returns the cookies for `restore` in a later process."""
        pod = self._pods.get(uid)
        return sorted(pod.known.cookies) if pod else []

    def restore(self, uid: str, cookies: Iterable[int]) -> None:
        """Takes the note of a previous agent; an outdated one is harmless, as the kernel never reuses a cookie."""
        if known := frozenset(cookies):
            self._pods[uid] = _Pod(self._select, Preexisting(known))

    def close(self) -> None:
        """Closes all handles at the end of the process."""
        for uid in list(self._pods):
            self.forget(uid)

    def _look(self, pod: _Pod, target: PodNetns) -> tuple[TcpSocket, ...]:
        return pod.known.remaining(pod.read(target), self._select) if pod.known else ()
