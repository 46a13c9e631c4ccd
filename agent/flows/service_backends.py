# SPDX-License-Identifier: Apache-2.0
"""Finds the endpoint that the node chose for a service's address, in conntrack while it has the connection."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

from agent.core.errors import KernelError
from agent.flows.record import Connection, Direction, Fate
from agent.kernel.netlink.ctnetlink import Conntrack


class Endpoints:
    """Reads conntrack in the node's namespace, where kube-proxy's rules are. For any thread."""

    def __init__(self) -> None:
        self._conntrack: Conntrack | None = None
        self._turn = threading.Lock()

    def resolved(self, connection: Connection) -> Connection:
        """Sets `peer` to the chosen endpoint, unless ztunnel chose it or it is the requested address itself."""
        if connection.peer or connection.fate is Fate.CAPTURED or connection.direction is Direction.INBOUND:
            return connection
        try:
            with self._turn:
                if self._conntrack is None:
                    self._conntrack = Conntrack()
                endpoint = self._conntrack.endpoint(socket.IPPROTO_TCP, connection.local, connection.remote)
        except KernelError:  # no conntrack here, so nothing was chosen by it
            return connection
        return connection if endpoint in (None, connection.remote) else replace(connection, peer=endpoint)

    def close(self) -> None:
        with self._turn:
            if self._conntrack is not None:
                self._conntrack.close()
                self._conntrack = None
