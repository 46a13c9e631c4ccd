# SPDX-License-Identifier: Apache-2.0
"""Copies of packets that pass one interface, picked by a filter: a packet socket (packet(7)). Nothing is held up.

While none passes the filter the socket costs the pod's packets a run of that filter, and the agent a descriptor. Its
buffer is the limit of the rate: what does not fit until the next reading is lost, and counted by the kernel.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from agent.kernel import socket_filter
from agent.kernel.netns import Netns

_EVERYTHING: Final = 0x0003  # ETH_P_ALL: with a single protocol nothing is seen that leaves
_SOL_PACKET, _STATISTICS, _IGNORE_OUTGOING = 263, 6, 23  # linux/if_packet.h
_SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h; also the type of the control message
_TIME = struct.Struct("@qq")
_STATS = struct.Struct("=II")  # struct tpacket_stats: packets with the lost ones, lost ones
BUFFER: Final = 128 << 10  # bytes; the kernel doubles it, and counts some 800 for a small packet
_CONTROL: Final = socket.CMSG_SPACE(_TIME.size)


class PacketTap:
    """The tap of one interface. For one thread at a time."""

    def __init__(self, netns: Netns, index: int, program: bytes, *, longest: int, outgoing: bool) -> None:
        """Opens it in the namespace, at the interface with that index. Raises OSError.

        `longest` is the most bytes that the filter lets copy. Without `outgoing` only what arrives is seen: on lo
        that is each packet once.
        """
        self._longest = longest
        self.socket = netns.call(_make)
        try:
            self.socket.setblocking(False)
            socket_filter.attach(self.socket, program)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            if not outgoing:
                self.socket.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
            netns.call(lambda: self.socket.bind((socket.if_indextoname(index), _EVERYTHING)))
        except BaseException:
            self.close()
            raise

    def take(self, most: int) -> tuple[list[tuple[float, bytes]], int]:
        """Returns at most `most` packets with their Unix times, and how many were lost since the last call.

        Packets begin with their IP header. An interface that was set down, or is gone, has none.
        """
        taken = list[tuple[float, bytes]]()
        receive = self.socket.recvmsg
        longest = self._longest
        try:
            while len(taken) < most:
                data, control, _, _ = receive(longest, _CONTROL)
                seconds, nanoseconds = _TIME.unpack_from(control[0][2])
                taken.append((seconds + nanoseconds / 1e9, data))
        except OSError:  # EAGAIN; ENETDOWN, which the kernel reports once
            pass
        _, lost = _STATS.unpack(self.socket.getsockopt(_SOL_PACKET, _STATISTICS, _STATS.size))
        return taken, lost

    def close(self) -> None:
        """Blocks for some 10 ms: the kernel waits for packets that are under way (see kernel.grace)."""
        self.socket.close()


def _make() -> socket.socket:
    return socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)  # 0: sees nothing before bind
