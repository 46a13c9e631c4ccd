# SPDX-License-Identifier: Apache-2.0
"""A leak on purpose: by rules of its own, for which it needs CAP_NET_ADMIN, a pod gives its packets ztunnel's mark."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from agent.core.names import ZTUNNEL_MARK
from agent.kernel.exec import run

MARKED = socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK


@contextlib.contextmanager
def marking(netns: str | Path, match: str, mark: int = ZTUNNEL_MARK) -> Iterator[None]:
    """What matches, such as "tcp dport 80", meanwhile. A connection that was begun goes on by conntrack."""
    rule = f"{match} meta mark set {mark:#x}"
    chain = f"chain out {{\ntype route hook output priority -160\n{rule}\n}}"
    run(["nft", "-f", "-"], netns=netns, stdin=f"table inet own {{\n{chain}\n}}\n")
    try:
        yield
    finally:
        run(["nft", "delete", "table", "inet", "own"], netns=netns)
