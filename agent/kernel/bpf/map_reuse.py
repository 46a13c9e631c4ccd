# SPDX-License-Identifier: Apache-2.0
"""The pinned maps of one directory, kept open: opening one costs more than most of what is asked of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agent.kernel.bpf.map import Map


class Maps:
    """Open maps, for several threads. A map that was re-created under its name is opened again."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self._open: dict[str, tuple[int, Map]] = {}
        self._turn = threading.Lock()

    def exist(self) -> bool:
        """True if any map exists."""
        return os.path.exists(f"{self.directory}/pods")  # noqa: PTH110 - for each pod again and again

    def __getitem__(self, name: str) -> Map:
        """Not to be closed. Raises KernelError, ENOENT without a pin of that name."""
        path = f"{self.directory}/{name}"
        try:
            inode = os.stat(path).st_ino  # noqa: PTH116 - as above
        except FileNotFoundError:
            inode = 0
        with self._turn:
            held = self._open.get(name)
            if held is None or held[0] != inode:
                # The old one is closed after its last use.
                held = self._open[name] = inode, Map.open(Path(path))
            return held[1]
