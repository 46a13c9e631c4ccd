# SPDX-License-Identifier: Apache-2.0
"""The records that one end of TLS has to send, and how they get into its socket."""

from __future__ import annotations

import socket
import ssl


class TlsOutput:
    """Sends what is in `outgoing`, as far as the socket takes it; owns neither of the two."""

    __slots__ = ("_outgoing", "_socket", "_waiting")

    def __init__(self, connected: socket.socket, outgoing: ssl.MemoryBIO) -> None:
        self._socket = connected
        self._outgoing = outgoing
        self._waiting: memoryview | bytes = b""  # records that the socket did not take

    @property
    def size(self) -> int:
        """Returns how many bytes wait."""
        return len(self._waiting) + self._outgoing.pending

    def flush(self) -> None:
        """Sends records until the socket is full. An error of the socket is left to its next event."""
        try:
            while self._waiting or self._outgoing.pending:
                records = self._waiting or memoryview(self._outgoing.read())
                self._waiting = records
                self._waiting = records[self._socket.send(records) :]
        except BlockingIOError:
            pass
        except OSError:
            self._waiting = b""
            self._outgoing.read()
