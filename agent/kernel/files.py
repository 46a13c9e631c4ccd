# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are closed at the end of a `with`, small files, and files that are read again when they change."""

from __future__ import annotations

import os
from pathlib import Path

_NONE = (0, 0, 0)


class Descriptor:
    """Closes a file descriptor at the end of a `with`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def read_small(path: str, most: int = 1 << 16, directory: int | None = None) -> bytes:
    """Returns what one read(2) gives of a file in /proc or /sys: `most` bytes. Raises OSError.

    `path` is relative to the open `directory`, if there is one.
    """
    with Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)) as fd:
        return os.read(fd, most)


class WatchedFile:
    """A file that may be replaced or edited at any time, for one reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> str | None:
        """Its text, "" when it is not there; None when it is as it was at the last call.

        Raises OSError and UnicodeDecodeError; what could be looked at, but not read, counts as read.
        """
        try:
            status = self.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if version == self._seen:
                return None
            self._seen = version
            return self.path.read_text()
        except FileNotFoundError:
            known = self._seen == _NONE
            self._seen = _NONE
            return None if known else ""
