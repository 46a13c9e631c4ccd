# SPDX-License-Identifier: Apache-2.0
"""A file of lines that is rotated by size: `name`, `name.1`, ...; the oldest is removed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

STDOUT = "-"


class LogFile:
    """Writes lines; opens the file on the first write, with mode 0600 if it is new. All methods raise OSError."""

    def __init__(self, name: str, limit: int, keep: int) -> None:
        """Rotates at `limit` bytes and keeps `keep` old files. Neither applies unless it is a regular file."""
        self.name = name
        self._limit = limit
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._rotates = False

    def write(self, lines: bytes) -> None:
        """Writes all lines, or (in a regular file) none."""
        self._open()
        if self._rotates and self._size and self._size + len(lines) > self._limit:
            self.close()
            self._rotate()
            self._open()
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            if self._rotates:
                os.ftruncate(self._fd, self._size)  # leaves no partial line, and no bytes of records that count as lost
            raise
        self._size += len(lines)

    def close(self) -> None:
        if self._fd >= 0 and self.name != STDOUT:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> None:
        if self.name == STDOUT:
            self._fd = 1
            return
        if self._fd >= 0:
            if self._same():
                return
            self.close()  # another program rotated or removed it
        # Readable too, to see how it ends.
        self._fd = os.open(self.name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        status = os.fstat(self._fd)
        self._rotates = stat.S_ISREG(status.st_mode)
        self._size = status.st_size
        if self._rotates and self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._size += os.write(self._fd, b"\n")  # the last line is from an earlier agent that was killed

    def _same(self) -> bool:
        try:
            named = Path(self.name).stat()
            opened = os.fstat(self._fd)
        except FileNotFoundError:
            return False
        self._size = opened.st_size  # others may have truncated it
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def _rotate(self) -> None:
        """Rotates the files; on failure no more is written: a file that only grows would fill the disk."""
        names = [Path(self.name), *(Path(f"{self.name}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            try:
                newer.replace(older)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
        if not self._keep:
            names[0].unlink(missing_ok=True)
