# SPDX-License-Identifier: Apache-2.0
"""Paths of the host, seen from a container: below the directory where the host's file system is mounted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MOST_LINKS = 40  # as the kernel's own MAXSYMLINKS


class HostRoot:
    """Resolves paths of the host. An absolute symlink of the host starts at the host's root, not at the container's."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def path(self, host: str) -> Path:
        """Returns the path at which this process finds a path of the host, with all links followed.

        Parts that do not exist stay as they are. Raises OSError, ELOOP, for links in a circle.
        """
        todo = [part for part in reversed(host.split("/")) if part not in ("", ".")]
        done: list[str] = []
        root = str(self.root)
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                done = done[:-1]
                continue
            try:
                target = os.readlink("/".join((root, *done, part)))  # noqa: PTH115 - a Path costs ten times as much
            except OSError:
                done.append(part)
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), host)
            if target.startswith("/"):
                done = []
            todo += [one for one in reversed(target.split("/")) if one not in ("", ".")]
        return self.root.joinpath(*done)
