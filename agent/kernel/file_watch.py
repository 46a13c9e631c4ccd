# SPDX-License-Identifier: Apache-2.0
"""A file that may be replaced or edited at any time: read again when it has changed."""

from __future__ import annotations

from pathlib import Path

_NONE = (0, 0, 0)


class WatchedFile:
    """One reader."""

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
