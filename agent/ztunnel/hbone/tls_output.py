# SPDX-License-Identifier: Apache-2.0
"""The records that one end of TLS has to send, and how they get into its transport."""

from __future__ import annotations

import ssl

from agent.ztunnel.hbone.session_transport import Transport


class TlsOutput:
    """Sends what is in `outgoing`, as far as the transport takes it; owns neither of the two."""

    __slots__ = ("_outgoing", "_transport", "_waiting")

    def __init__(self, transport: Transport, outgoing: ssl.MemoryBIO) -> None:
        self._transport = transport
        self._outgoing = outgoing
        self._waiting: memoryview | bytes = b""  # records that the transport did not take

    @property
    def size(self) -> int:
        """Returns how many bytes wait."""
        return len(self._waiting) + self._outgoing.pending

    def flush(self) -> None:
        """Sends records until the transport is full. An error of it is left to its next event."""
        try:
            while self._waiting or self._outgoing.pending:
                records = self._waiting or memoryview(self._outgoing.read())
                self._waiting = records
                self._waiting = records[self._transport.send(records) :]
        except BlockingIOError:
            pass
        except OSError:
            self._waiting = b""
            self._outgoing.read()
