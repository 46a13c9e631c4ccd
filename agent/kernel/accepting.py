# SPDX-License-Identifier: Apache-2.0
"""Accepts connections. A failed accept is retried and logged once a minute; the number of connections is limited."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.kernel.unix_socket import listen

log = logging.getLogger("sluice.socket")
RESERVE = 64  # descriptors kept free for CNI, ZDS and what an ADD opens
_QUIET = 60.0  # seconds between two log lines of one kind
_AT_ONCE = 512  # connections to a unix socket that are served; a node has fewer pods
_LOOK = 1.0  # seconds between two looks whether the file is still there
_RESET = struct.pack("ii", 1, 0)  # struct linger: closing resets, and keeps nothing
Handle = Callable[[socket.socket], Coroutine[Any, Any, None]]


class Seldom:
    """Logs one kind of event at most once a minute, with how many there were."""

    def __init__(self, level: int = logging.WARNING) -> None:
        self._level = level
        self._count = 0
        self._next = 0.0

    def log(self, message: str) -> None:
        self._count += 1
        if time.monotonic() >= self._next:
            more = f" ({self._count} times since this was logged last)" if self._count > 1 else ""
            log.log(self._level, "%s%s", message, more)
            self._count = 0
            self._next = time.monotonic() + _QUIET


async def accept(listener: socket.socket, seldom: Seldom) -> tuple[socket.socket, Any]:
    """Returns the next connection and its peer's address. Errors are logged and accept is tried again."""
    while True:
        try:
            return await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            seldom.log(f"accept on {listener.getsockname()}: {error.strerror}; trying again")
            if error.errno != errno.ECONNABORTED:  # of one peer; all others last, such as EMFILE
                await asyncio.sleep(0.1)


def reset_at_close(sock: Any) -> None:
    """Makes close() discard unsent data, so the kernel keeps nothing of the connection."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


class Limits:
    """The most connections in all, and from one address; an IPv6 /64 counts as one, since a host may own all of it."""

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._held: Counter[str] = Counter()
        self._full = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE

    def refusal(self, sock: socket.socket, key: str) -> str:
        """Returns why this connection is refused, or "". For the node's own, such as kubelet, only `each` applies."""
        if self._held[key] >= self._each:
            return f"{key or 'root'} has {self._each} connections, and more are not allowed"
        if key == host(sock.getsockname()):
            return ""
        if self._held.total() >= self._most:
            return f"there are {self._most} connections, and more are not allowed"
        if sock.fileno() >= self._full:  # the lowest free one
            return "the last descriptors are kept for CNI and ztunnel"
        return ""

    def enter(self, key: str) -> None:
        self._held[key] += 1

    def leave(self, key: str) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]


def host(address: Any) -> str:
    """Returns the key of `Limits` for a peer's address: an IPv4 address or an IPv6 /64; "" on a unix socket."""
    if not isinstance(address, tuple):
        return ""
    known = ipaddress.ip_address(address[0].partition("%")[0])
    if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(known), 64), strict=False))
    return str(getattr(known, "ipv4_mapped", known))


async def strangers(listener: socket.socket, limits: Limits, handle: Handle) -> None:
    """Serves each connection in its own task and resets those beyond the limits, until cancelled. Closes them all."""
    broken, refused = Seldom(logging.ERROR), Seldom()

    async def one(sock: socket.socket, key: str) -> None:
        try:
            with sock, contextlib.suppress(OSError):
                await handle(sock)
        except Exception:  # a defect met by one connection must not end the agent
            log.exception("a connection to %s failed", name)
        finally:
            limits.leave(key)

    with listener:
        listener.setblocking(False)
        name = listener.getsockname()
        async with asyncio.TaskGroup() as tasks:
            while True:
                sock, address = await accept(listener, broken)
                key = host(address)
                if reason := limits.refusal(sock, key):
                    reset_at_close(sock)
                    sock.close()
                    refused.log(f"a connection to {name} was reset: {reason}")
                else:
                    limits.enter(key)
                    tasks.create_task(one(sock, key))
                await asyncio.sleep(0)  # accepting alone would let nothing else run while there is a queue


async def serve(path: str, kind: int, handle: Handle) -> None:
    """Serves each connection in a task of its own, which closes it, until cancelled. The socket file stays behind.

    A file that another program removes is made again: istio-cni's agent unlinks ztunnel's socket at its end, also when
    it is ours by then (net.UnixListener.Close). One that is another socket by now is left alone.
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
    """Accepts connections. Only root connects here, so those beyond the limit wait in the queue and are not refused."""
    room = asyncio.Semaphore(_AT_ONCE)
    broken = Seldom(logging.ERROR)

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
