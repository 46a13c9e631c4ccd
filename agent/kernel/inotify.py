# SPDX-License-Identifier: Apache-2.0
"""Events in directories; inotify(7), linux/inotify.h."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.kernel.libc import last_error, libc

MODIFY: Final = 0x2
CLOSE_WRITE: Final = 0x8
MOVED_FROM: Final = 0x40
MOVED_TO: Final = 0x80
CREATE: Final = 0x100
DELETE: Final = 0x200
DELETE_SELF: Final = 0x400
MOVE_SELF: Final = 0x800
ONLYDIR: Final = 0x1000000
CHANGES: Final = MODIFY | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF

_EVENT = struct.Struct("@iIII")  # struct inotify_event: wd, mask, cookie, len


@dataclass(frozen=True, slots=True)
class Event:
    """`watch` is what `add` returned, -1 if events were lost; `name` is empty for the directory itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """One queue of events, non-blocking; `fileno` is readable while there are some."""

    def __init__(self) -> None:
        """Raises KernelError: EMFILE when the user's limit of queues (fs.inotify.max_user_instances) is used up."""
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise last_error("inotify_init1")

    def fileno(self) -> int:
        return self._fd

    def add(self, directory: Path) -> int:
        """Watches what `CHANGES` lists. Raises KernelError: ENOSPC when fs.inotify.max_user_watches is used up."""
        watch: int = libc.inotify_add_watch(self._fd, os.fsencode(directory), CHANGES | ONLYDIR)
        if watch < 0:
            raise last_error(f"inotify_add_watch {directory}")
        return watch

    def remove(self, watch: int) -> None:
        """Removes a watch; fine if it has gone already."""
        libc.inotify_rm_watch(self._fd, watch)

    def take(self) -> list[Event]:
        """Returns all waiting events, in order."""
        events: list[Event] = []
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return events
            at = 0
            while at < len(data):
                watch, mask, _, size = _EVENT.unpack_from(data, at)
                at += _EVENT.size + size
                events.append(Event(watch, mask, os.fsdecode(data[at - size : at].rstrip(b"\0"))))

    def close(self) -> None:
        os.close(self._fd)
