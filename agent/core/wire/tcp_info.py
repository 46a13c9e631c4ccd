# SPDX-License-Identifier: Apache-2.0
"""The kernel's counts of one TCP connection (struct tcp_info of linux/tcp.h), and the payload among them. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from agent.core.model.sockets import TcpSocket, TcpState

# retransmits, probes; last_data_sent, last_data_recv, last_ack_recv; rtt; total_retrans; bytes_acked, bytes_received;
# segs_out, segs_in; data_segs_in; bytes_sent, bytes_retrans. The last two are there since Linux 4.19.
_INFO: Final = struct.Struct("=2xBB40xI4xII8xI28xI16xQQII8xI44xQQ")


# By position: it is what _INFO unpacks.
@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Ages of the last data and acknowledgements are in milliseconds, `rtt` in microseconds.

    `acked` and `received` are of sequence numbers, in which SYN and FIN count as a byte each: `acked` has the SYN of
    the side that connects, and the FIN once it is acknowledged; `received` has the peer's FIN, never its SYN.
    `sent` and `resent` are bytes of payload alone. `retransmits` and `probes` are those under way, without an answer.
    """

    retransmits: int
    probes: int
    age_sent: int
    age_received: int
    age_acked: int
    rtt: int
    retransmitted: int
    acked: int
    received: int
    segments_out: int
    segments_in: int
    data_in: int
    sent: int
    resent: int

    @property
    def unique(self) -> int:
        """Payload that was sent at least once."""
        return self.sent - self.resent

    @property
    def beyond(self) -> int:
        """Returns the bytes acknowledged in addition to payload: SYN and FIN. Negative while payload is on its way."""
        return self.acked - self.unique


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpReport:
    """One socket and its counts, in a dump or at its destruction: then in state CLOSE, without user, inode and mark.

    `ends` are its ports and addresses as in the message. `unread`: received and not read by the application, a FIN
    counts as one. `unacked`: written and not acknowledged.
    A socket that was reset by its own side (SO_LINGER 0), or that waited after a failed connect, has no remote port any
    more and counts of zero (tcp_disconnect); then `unacked` is 3 if it never was connected, more if it was.
    """

    socket: TcpSocket
    ends: bytes
    unread: int
    unacked: int
    info: TcpInfo

    @property
    def used(self) -> bool:
        """True if it is, or was, a connection: neither a listener nor a socket that was never connected."""
        one = self.socket
        return bool(one.local[1]) and one.state is not TcpState.LISTEN and one.remote[0] not in ("0.0.0.0", "::")

    @property
    def disconnected(self) -> bool:
        return not self.socket.remote[1]


SIZE: Final = _INFO.size
NOTHING: Final = TcpInfo(*[0] * 14)


def decode(payload: bytes) -> TcpInfo | None:
    """Decodes struct tcp_info; None when it is shorter than a supported kernel writes it."""
    return TcpInfo(*_INFO.unpack_from(payload)) if len(payload) >= _INFO.size else None
