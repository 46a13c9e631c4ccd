"""Listening unix sockets that only root may use, and who is at the other end."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path


def listen(path: str, kind: int) -> socket.socket:
    """A listening unix socket of mode 0600 at `path`, in place of a stale one."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    place.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
