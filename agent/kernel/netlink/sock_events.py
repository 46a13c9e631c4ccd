# SPDX-License-Identifier: Apache-2.0
"""Notifications of the end of TCP sockets, with their last counts (sock_diag_broadcast_destroy).

A notification shows the socket as it was when its last reference went: no mark, no user, no inode. A socket that goes
to TIME_WAIT is notified then; the timer that stays is not a socket.
"""

from __future__ import annotations

import socket
from typing import Final

from agent.core.wire.netlink import HEADER
from agent.core.wire.tcp_info import TcpReport
from agent.kernel.netlink.netlink_socket import SO_RCVBUFFORCE, NetlinkSocket
from agent.kernel.netlink.sock_diag import NETLINK_SOCK_DIAG, report

_GROUPS: Final = (1, 3)  # SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY
BUFFER: Final = 32 << 20  # bytes; the kernel doubles it, and counts some 1300 for each socket
_MOST: Final = 1 << 13  # one message is some 400 bytes


class SocketEvents(NetlinkSocket):
    """Make it inside the namespace that it is to listen to; usable from anywhere afterwards. One thread."""

    def __init__(self, *, buffer: int = BUFFER) -> None:
        super().__init__(NETLINK_SOCK_DIAG, groups=_GROUPS)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
            self.socket.setblocking(False)
        except BaseException:
            self.close()
            raise

    def take(self) -> tuple[list[TcpReport], bool]:
        """Returns all that wait, and whether some were lost for want of room; the kernel does not count those.

        Sockets that never were connections are left out.
        """
        taken: list[TcpReport] = []
        lost = False
        receive = self.socket.recv
        start = HEADER.size
        while True:
            try:
                one = report(receive(_MOST)[start:])
            except BlockingIOError:
                return taken, lost
            except OSError:  # ENOBUFS, reported once until the queue has been emptied
                if lost:
                    return taken, lost
                lost = True
                continue
            if one is not None and one.used:
                taken.append(one)
