# SPDX-License-Identifier: Apache-2.0
"""The probes, one module per group of facts: the only part of this package that reads the node."""

from __future__ import annotations

import contextlib
from pathlib import Path


def read(path: Path) -> str:
    """Returns the text without white space around it; "" if the file cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def inotify_queues(process: Path) -> list[Path]:
    """Returns the descriptors of a process, as in /proc/PID/fd/7, that are queues of file events. Raises OSError."""
    queues = []
    for path in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(path.readlink()) == "anon_inode:inotify":
                queues.append(path)
    return queues
