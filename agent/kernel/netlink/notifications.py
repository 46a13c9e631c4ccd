# SPDX-License-Identifier: Apache-2.0
"""Multicast notifications of one namespace, and whether what was learned before them still holds.

The event loop reads them; a worker asks at any time whether anything was notified since it looked. That is sound
because the kernel delivers or reports a loss (ENOBUFS), and an unread notification counts as well.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from agent.core.wire.netlink import Message, messages
from agent.kernel.netlink.netlink_socket import NetlinkSocket

BELIEVED: Final = 300.0  # seconds: however quiet it is, everything is read again now and then


@dataclass(frozen=True, slots=True)
class NotificationMark:
    """A moment that knowledge dates from; to be made before the kernel is asked."""

    epoch: int
    time: float


class Notifications(NetlinkSocket):
    """`take` belongs to the event loop's thread; `mark` and `unchanged_since` to the pod's worker."""

    def __init__(self, family: int, groups: Iterable[int], *, only: bytes = b"") -> None:
        super().__init__(family, groups=groups, only=only)
        self.socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)
        self._epoch = 0
        self._taking = False

    def mark(self) -> NotificationMark:
        return NotificationMark(self._epoch, time.monotonic())

    def unchanged_since(self, mark: NotificationMark) -> bool:
        # In this order: what is no longer waiting is either being looked at, or has been counted.
        if self._poll.poll(0) or self._taking or self._epoch != mark.epoch:
            return False
        return time.monotonic() - mark.time < BELIEVED

    def take(self) -> tuple[list[Message], bool]:
        """Returns all that waits, and whether some was lost. Outdates every earlier mark, also for our own changes."""
        taken: list[Message] = []
        lost = False
        self._taking = True
        try:
            while True:
                try:
                    taken += messages(self.socket.recv(1 << 16))
                except BlockingIOError:
                    break
                except OSError:  # ENOBUFS
                    if lost:
                        break
                    lost = True
            # At the end: until all is read the kernel does not say again that it loses some.
            if lost or taken:
                self._epoch += 1
        finally:
            self._taking = False
        return taken, lost
