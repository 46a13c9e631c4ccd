# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets that only root may use, and who is at the other end; one agent per directory."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

from agent.core.errors import SluiceError


def listen(path: str, kind: int) -> socket.socket:
    """Returns a listening unix socket of mode 0600 at `path`, in place of a stale one."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    file.unlink(missing_ok=True)
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
    """Returns (pid, uid) of the process that connected."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def claim(directory: Path) -> int:
    """Makes the directory and a lock on it, held until the process ends.

    Raises SluiceError when that cannot be written, and while another process has the lock.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SluiceError(
            f"run_dir {directory}: {error.strerror}; it must be a directory that root can write to"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise SluiceError(f"another agent runs on {directory}; stop it first, or give another run_dir") from None
    return descriptor
