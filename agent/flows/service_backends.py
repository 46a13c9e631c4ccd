"""Which endpoint the node chose for a service's address, as conntrack has it while it remembers the connection."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

from agent.core.errors import KernelError
from agent.flows.record import Connection, Direction, Fate
from agent.kernel.netlink.conntrack import Conntrack


class Endpoints:
    """Asks in the namespace of this process, the node's, where kube-proxy's rules are. From any thread."""

    def __init__(self) -> None:
        self._conntrack: Conntrack | None = None
        self._turn = threading.Lock()

    def resolved(self, connection: Connection) -> Connection:
        """With the `peer` that was chosen, where no ztunnel did it, and it is another than was asked for."""
        if connection.peer or connection.fate is Fate.CAPTURED or connection.direction is Direction.INBOUND:
            return connection
        try:
            with self._turn:
                if self._conntrack is None:
                    self._conntrack = Conntrack()
                found = self._conntrack.endpoint(socket.IPPROTO_TCP, connection.local, connection.remote)
        except KernelError:  # no conntrack here, so nothing was chosen by it
            return connection
        return connection if found in (None, connection.remote) else replace(connection, peer=found)

    def close(self) -> None:
        with self._turn:
            if self._conntrack is not None:
                self._conntrack.close()
                self._conntrack = None
