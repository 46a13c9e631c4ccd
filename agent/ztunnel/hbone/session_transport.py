# SPDX-License-Identifier: Apache-2.0
"""The transport of a session's TLS records: a socket, or a stream of another session (see inner_session)."""

from __future__ import annotations

import os
import socket
from typing import Protocol

from agent.ztunnel.relay.poller import Handler, Poller


class Transport(Protocol):
    """Connects, and moves bytes like a non-blocking socket. The session owns it."""

    def start(self, event: Handler) -> None:
        """Calls `event` with masks of poller, from the present state on. Raises OSError: out of memory."""

    def connect_failure(self) -> str:
        """Returns why there is no connection, once `event` has reported a result; "" if there is one."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Raises BlockingIOError without bytes; returns 0 at the end."""

    def send(self, data: memoryview | bytes, /) -> int:
        """Returns how many bytes were taken. Raises BlockingIOError if none."""

    def close(self) -> None:
        """Ends it in an orderly way; what was sent still arrives."""


class SocketTransport:
    """Owns a socket: of a client one that connects, of a server an accepted one."""

    __slots__ = ("_poller", "_socket", "recv_into", "send")

    def __init__(self, poller: Poller, connected: socket.socket) -> None:
        self._poller = poller
        self._socket = connected
        self.recv_into = connected.recv_into  # without a call in between: they are the hot path
        self.send = connected.send

    def start(self, event: Handler) -> None:
        self._poller.add(self._socket.fileno(), event)

    def connect_failure(self) -> str:
        failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return os.strerror(failed) if failed else ""

    def close(self) -> None:
        self._poller.remove(self._socket.fileno())
        self._socket.close()
