# SPDX-License-Identifier: Apache-2.0
"""The probe canary: connects from the node to a pod that was just enrolled, as the kubelet will.

It shows that the node reaches the pod and bypasses ztunnel, before a failing kubelet probe restarts the pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

from agent.core.model.port_listeners import probed
from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.core.policy.canary import ProbeResult, ProbeVerdict, judge
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns

TRIES = 3  # seconds
TIMEOUT = 1.0
PAUSE = 0.2
WINDOW = 60.0  # seconds after the enrolment to wait for a pod's first listener


# Runs kernel work without blocking the event loop.
Run = Callable[[Callable[[], list[TcpSocket]]], Awaitable[list[TcpSocket]]]


class _View:
    """Reads the pod's sockets; uses the pod's handle only in the constructor. Closing waits for a reading thread."""

    def __init__(self, target: PodNetns) -> None:
        self._diag = target.netns.call(SockDiag)
        self._lock = threading.Lock()

    def read(self, *states: TcpState) -> list[TcpSocket]:
        with self._lock:
            return self._diag.both(states or TcpState)

    def close(self) -> None:
        with self._lock:
            self._diag.close()


class ProbeCanary:
    """Probes newly enrolled pods. Methods belong to the event loop's thread."""

    def __init__(
        self,
        probe_ipv4: str,
        probe_ipv6: str,
        *,
        run: Run = asyncio.to_thread,
        make: Callable[[int], socket.socket] = lambda family: socket.socket(family, socket.SOCK_STREAM),
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes `make`, which opens the socket that connects, in the namespace that counts as the node's."""
        self._probe = {4: probe_ipv4, 6: probe_ipv6}
        self._run = run
        self._make = make
        self._timeout = timeout
        self._clock = clock
        self._until: dict[str, float] = {}

    def enrolled(self, uid: str) -> None:
        """Makes a newly enrolled pod due, after ztunnel has acknowledged it."""
        self._until[uid] = self._clock() + WINDOW

    def due(self, uid: str) -> bool:
        """Returns True if the pod must be probed: newly enrolled, and no listener of it was probed yet."""
        if uid in self._until and self._clock() > self._until[uid]:
            del self._until[uid]
        return uid in self._until

    def done(self, uid: str, result: ProbeResult) -> None:
        """Takes the result of a probe: only a pod without a listener stays due."""
        if result.verdict is not ProbeVerdict.NO_LISTENER:
            self.forget(uid)

    def forget(self, uid: str) -> None:
        self._until.pop(uid, None)

    async def probe(self, addresses: Sequence[str], target: PodNetns, *, ipv6: bool) -> ProbeResult:
        """Probes the pod; takes up to TRIES * (timeout + PAUSE). Raises KernelError or NetnsError if it is unreadable.

        `target` may be closed once this has begun to wait. An application that is too busy to accept looks the same as
        a blocked path.
        """
        with contextlib.closing(_View(target)) as view:
            tried = probed(await self._run(lambda: view.read(TcpState.LISTEN)), addresses, ipv6=ipv6)
            if tried is None:
                return ProbeResult(ProbeVerdict.NO_LISTENER)
            for attempt in range(TRIES):
                if attempt:
                    await asyncio.sleep(PAUSE)
                result, sure = await self._try(view, tried)
                if sure:
                    break
            return result

    async def _try(self, view: _View, tried: Endpoint) -> tuple[ProbeResult, bool]:
        """Returns the result of one connection, and whether it is final."""
        family = socket.AF_INET6 if ":" in tried[0] else socket.AF_INET
        try:
            with self._make(family) as connection:
                connection.setblocking(False)
                async with asyncio.timeout(self._timeout):
                    await asyncio.get_running_loop().sock_connect(connection, tried)
                own: Endpoint = connection.getsockname()[:2]
                probe = self._probe[6 if family == socket.AF_INET6 else 4]
                result = judge(await self._run(view.read), tried, own, probe)
                return result or _unseen(connection, tried), result is not None
        except TimeoutError:
            return ProbeResult(ProbeVerdict.FAILED, tried, f"no answer in {self._timeout:g} s"), False
        except OSError as error:
            return ProbeResult(ProbeVerdict.FAILED, tried, os.strerror(error.errno or 0)), False


def _unseen(connection: socket.socket, tried: Endpoint) -> ProbeResult:
    """Returns the result for a connection without an other end in the pod."""
    failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failed:  # an application or a ztunnel that resets at once leaves no trace
        return ProbeResult(ProbeVerdict.FAILED, tried, f"connected, then: {os.strerror(failed)}")
    return ProbeResult(ProbeVerdict.CAPTURED, tried, "connected, but not with the pod's listener")
