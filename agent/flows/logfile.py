"""A file of lines that is rotated by size: `name`, `name.1`, ... the oldest goes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

STDOUT = "-"


class LogFile:
    """All methods raise OSError. Opened when it is first written to; mode 0600, unless it is there already."""

    def __init__(self, name: str, limit: int, keep: int) -> None:
        """`limit` in bytes; `keep` old files besides. Neither is for what is no regular file."""
        self.name = name
        self._limit = limit
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._rotates = False

    def write(self, lines: bytes) -> None:
        """All of them, or (in a regular file) none."""
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
                os.ftruncate(self._fd, self._size)  # no half line stays, and no room is taken by what counts as lost
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
            self.close()  # somebody else rotated or removed it
        # Read too, to see how it ends.
        self._fd = os.open(self.name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        found = os.fstat(self._fd)
        self._rotates = stat.S_ISREG(found.st_mode)
        self._size = found.st_size
        if self._rotates and self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._size += os.write(self._fd, b"\n")  # the last line is an earlier agent's that was killed

    def _same(self) -> bool:
        try:
            found = Path(self.name).stat()
            ours = os.fstat(self._fd)
        except FileNotFoundError:
            return False
        self._size = ours.st_size  # others may have truncated it
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def _rotate(self) -> None:
        """Where it cannot, nothing more is written: a file that only grows would fill the disk."""
        names = [Path(self.name), *(Path(f"{self.name}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            try:
                newer.replace(older)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
        if not self._keep:
            names[0].unlink(missing_ok=True)
