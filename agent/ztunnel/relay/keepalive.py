# SPDX-License-Identifier: Apache-2.0
"""Keepalive for an application: it speaks with ztunnel, so only ztunnel can detect that the far end is gone.

All sockets of ztunnel probe after DEFAULT_IDLE seconds, as those of Istio's ztunnel, or earlier if the pod's kernel
says so (tcp_keepalive_time). If an application's socket probes still earlier, sock_diag shows its timer, but not its
interval and count: the socket towards the far end gives up after three times the idle time.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable

from agent.core.errors import KernelError
from agent.core.model.sockets import Endpoint
from agent.kernel.netlink.sock_diag import SockDiag

LOOK_SECONDS = 2.0  # after connecting: many set the option only then, and most connections have ended
DEFAULT_IDLE, DEFAULT_INTERVAL, DEFAULT_COUNT = 180, 180, 9
COUNT = 6
_MOST_IDLE = 32767  # the kernel's limit


def idle_seconds(diag: SockDiag, ends: Iterable[tuple[Endpoint, Endpoint]], age: float) -> int:
    """Returns the idle seconds after which the application's socket probes; 0 if it does not, or is not found.

    `ends`: (its own, the remote one), as the kernel may know them. `age`: seconds since the socket connected, which is
    when its timer most likely started.
    """
    for local, remote in ends:
        with contextlib.suppress(KernelError, OSError):
            left = diag.keepalive(local, remote)
            if left is not None:
                return min(_MOST_IDLE, max(1, math.ceil(left + age))) if left else 0
    return 0


def probe_by_default(fresh: socket.socket) -> None:
    """Lets a new socket, and those that it accepts, probe their peers. Raises OSError."""
    fresh.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) > DEFAULT_IDLE:
        _set(fresh, DEFAULT_IDLE, DEFAULT_INTERVAL, DEFAULT_COUNT)


def probe(far: socket.socket, idle: int) -> None:
    """Lets the socket probe its peer after `idle` seconds, unless it does so already. Raises OSError."""
    if idle < far.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE):
        _set(far, idle, max(1, idle // 3), COUNT)


def _set(probing: socket.socket, idle: int, interval: int, count: int) -> None:
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, count),
    ):
        probing.setsockopt(socket.IPPROTO_TCP, option, value)
