# SPDX-License-Identifier: Apache-2.0
"""Keepalive for an application: it speaks with ztunnel, so only ztunnel can detect that the far end is gone.

All sockets of ztunnel probe with the default of the pod's kernel (tcp_keepalive_time). If an application's socket
probes earlier, sock_diag shows its timer, but not its interval and count: the socket towards the far end gives up after
three times the idle time.
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
COUNT = 6
_MOST_IDLE, _MOST_INTERVAL = 32767, 75  # the kernel's limit, and its default


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


def probe(far: socket.socket, idle: int) -> None:
    """Lets the socket probe its peer after `idle` seconds. Raises OSError."""
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, max(1, min(_MOST_INTERVAL, idle // 3))),
        (socket.TCP_KEEPCNT, COUNT),
    ):
        far.setsockopt(socket.IPPROTO_TCP, option, value)
