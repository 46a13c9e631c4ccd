"""Listening unix sockets that only root may use, and who is at the other end; one agent per directory."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.kernel.accepting import Seldom, accept

log = logging.getLogger("sluice.socket")
_AT_ONCE = 512  # connections that are served; a node has fewer pods
_LOOK = 1.0  # seconds between two looks whether the file is still there


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


Handle = Callable[[socket.socket], Coroutine[Any, Any, None]]


async def serve(path: str, kind: int, handle: Handle) -> None:
    """Each connection in a task of its own, which closes it; until cancelled. The socket file stays behind.

    A file that somebody removes is made again: istio-cni's agent unlinks ztunnel's socket at its end, also when it is
    ours by then (net.UnixListener.Close). One that is another socket by now is left to whoever made it.
    """
    async with asyncio.TaskGroup() as tasks:
        accepting = tasks.create_task(_accept_all(listen(path, kind), handle, tasks))
        while True:
            await asyncio.sleep(_LOOK)
            if not Path(path).is_socket():
                log.warning("the socket %s was removed; it is made again", path)
                accepting.cancel()
                accepting = tasks.create_task(_accept_all(listen(path, kind), handle, tasks))


async def _accept_all(listener: socket.socket, handle: Handle, tasks: asyncio.TaskGroup) -> None:
    """Only root connects here, so connections beyond the limit wait in the queue and are not refused."""
    room, broken = asyncio.Semaphore(_AT_ONCE), Seldom(logging.ERROR)

    async def one(sock: socket.socket) -> None:
        try:
            await handle(sock)
        finally:
            room.release()

    with listener:
        while True:
            await room.acquire()
            sock, _ = await accept(listener, broken)
            tasks.create_task(one(sock))
            await asyncio.sleep(0)


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
