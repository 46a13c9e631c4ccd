# SPDX-License-Identifier: Apache-2.0
"""Finds the connections that ztunnel proxies for a pod, as sockets of the pod's namespace."""

from __future__ import annotations

import contextlib

from agent.core.model.sockets import CONNECTED, TcpSocket
from agent.core.policy.backend_switch import proxied
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns


class ZtunnelConnections:
    """Reads and resets proxied connections. Blocking."""

    def there(self, target: PodNetns) -> tuple[TcpSocket, ...]:
        """Returns both ends of each. Raises KernelError."""
        with contextlib.closing(target.netns.call(SockDiag)) as diag:
            return proxied(diag.both(CONNECTED))

    def reset(self, target: PodNetns) -> None:
        """Resets both ends, so that neither waits for the other. Raises KernelError."""
        with contextlib.closing(target.netns.call(SockDiag)) as diag:
            for one in proxied(diag.both(CONNECTED)):
                diag.destroy(one)
