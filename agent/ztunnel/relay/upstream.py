# SPDX-License-Identifier: Apache-2.0
"""Sockets made inside a pod's namespace, marked as ztunnel's, ready to connect.

Entering a namespace costs more than creating a socket, so each entry creates a few. A pod that opens no connections
holds none.

A socket with a client's address must not use a port that the client itself may use towards the same destination: in the
pod's conntrack both would be one flow, and the later of the two hangs. A client's kernel takes its ports from 32768 up
(Linux's default; others start higher), so ztunnel's are below.

Towards a server the pod's ephemeral ports are shared with the application, which rules only redirect: both sockets have
the server's address. Where many connections go to one server, ztunnel's leave those ports to the application.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from agent.core import names
from agent.core.errors import KernelError
from agent.kernel.netlink.sock_diag import SockDiag
from agent.ztunnel.relay import keepalive
from agent.ztunnel.relay.original_dst import Address

BATCH = 16
FIRST_PORT, LAST_PORT = 1024, 32767
TRIES = 64  # ports in use or in TIME_WAIT are skipped
FIRST_CROWDED = 10000  # applications listen on the ports below it
CROWDED = 16  # connections to one server count as many from that part of the ephemeral ports on
RESERVED = range(600, 1024)  # as bindresvport(3) takes them
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the port is chosen at connect, by destination
# Errors that refuse the client's address, not the connection: the application then sees ztunnel's.
_NO_SOURCE = (errno.EPERM, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENOPROTOOPT)
_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
_RETURNED = 1 << 30  # of a mark, outside of the bits that rules compare


T = TypeVar("T")


class Namespace(Protocol):
    """A network namespace in which a function can run; see agent.kernel.netns."""

    def call(self, function: Callable[[], T]) -> T:
        """Returns the function's result."""


class Upstream:
    """A stock of fresh, non-blocking, marked sockets of one pod."""

    def __init__(self, netns: Namespace) -> None:
        self._netns = netns
        self._stock: dict[tuple[int, int], list[socket.socket]] = {}
        # A random start, so that an instance that takes over does not walk through its predecessor's ports.
        self._port = random.randint(FIRST_PORT, LAST_PORT)
        self._held: dict[Address, int] = {}  # connections by server
        self._ephemeral = 0  # how many ports the pod has for that, as last read

    def take(self, destination: Address, kind: int) -> socket.socket:
        """Returns a socket of the destination's family; the caller owns it. Raises OSError or NetnsError."""
        family = socket.AF_INET if len(destination) == 2 else socket.AF_INET6
        stock = self._stock.setdefault((family, kind), [])
        if not stock:
            self._netns.call(lambda: self._make(family, kind, stock))
        return stock.pop()

    def connect(self, destination: Address, source: Address | None = None, *, returned: bool = False) -> socket.socket:
        """Returns a socket that connects as ztunnel. Raises OSError or NetnsError.

        `source`: of the application. Its address is kept if it is one of this namespace: routes may depend on it. In
        place of a reserved port the connection gets another reserved one. Call `release` when it has ended.

        `returned`: it goes on for a connection of ztunnel's own that came back (see mark_returned).
        """
        bound = self._keeping(destination, source, returned=returned) if source is not None else None
        return self._hold(destination, self._connect(destination, returned=returned) if bound is None else bound)

    def release(self, destination: Address) -> None:
        count = self._held.get(destination, 0) - 1
        if count > 0:
            self._held[destination] = count
        else:
            self._held.pop(destination, None)

    def _keeping(self, destination: Address, source: Address, *, returned: bool) -> socket.socket | None:
        ports: Iterable[int] = (0,)
        if source[1] in range(1, RESERVED.stop):
            ports = random.sample(RESERVED, TRIES)
        elif self._is_crowded(destination) and source[0] not in ("0.0.0.0", "::"):
            ports = (self._next_port(FIRST_CROWDED) for _ in range(TRIES))
        for port in ports:
            try:
                return self._connect(destination, partial(keep_source, source=source, port=port), returned=returned)
            except OSError as error:
                if error.errno not in _TAKEN:  # another port would not help
                    break
        return None

    def _is_crowded(self, destination: Address) -> bool:
        held = self._held.get(destination, 0)
        if held < CROWDED // 4:
            return False
        if held & (held - 1) == 0:  # a pod may change it; read seldom enough
            low, high = self._netns.call(_port_range)
            self._ephemeral = high - low + 1
        return held * CROWDED >= self._ephemeral

    def connect_as(self, source: Address, destination: Address) -> socket.socket:
        """Returns a socket that connects with the address, not the port, of `source`; otherwise like `connect`."""
        for _ in range(TRIES):
            port = self._next_port()
            try:
                return self._hold(
                    destination, self._connect(destination, partial(take_source, source=source, port=port))
                )
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
        raise OSError(errno.EADDRNOTAVAIL, f"no port free for {source[0]} in {TRIES} tries")

    def connect_for(self, source: Address, destination: Address) -> tuple[socket.socket, str]:
        """Connects like `connect_as`, but with ztunnel's address if the kernel refuses the client's.

        The second value says why then; otherwise it is "". Raises OSError or NetnsError.
        """
        try:
            return self.connect_as(source, destination), ""
        except OSError as error:
            if error.errno not in _NO_SOURCE:
                raise
            return self.connect(destination), f"source address not preserved: {error.strerror}"

    def _hold(self, destination: Address, connecting: socket.socket) -> socket.socket:
        self._held[destination] = self._held.get(destination, 0) + 1
        return connecting

    def _connect(
        self, destination: Address, prepare: Callable[[socket.socket], None] | None = None, *, returned: bool = False
    ) -> socket.socket:
        fresh = self.take(destination, socket.SOCK_STREAM)
        try:
            if returned:
                mark_returned(fresh)
            if prepare is not None:
                prepare(fresh)
            failed = fresh.connect_ex(destination)
            if failed not in (0, errno.EINPROGRESS):
                raise OSError(failed, os.strerror(failed))
        except OSError:
            fresh.close()
            raise
        return fresh

    def _next_port(self, first: int = FIRST_PORT) -> int:
        self._port = self._port + 1 if first <= self._port < LAST_PORT else first
        return self._port

    def _make(self, family: int, kind: int, stock: list[socket.socket]) -> None:
        for _ in range(BATCH if kind == socket.SOCK_STREAM else BATCH // 4):
            stock.append(marked(family, kind))

    def close(self) -> None:
        for stock in self._stock.values():
            for fresh in stock:
                fresh.close()
        self._stock.clear()


def _port_range() -> tuple[int, int]:
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()  # of both families
    return int(low), int(high)


def marked(family: int, kind: int) -> socket.socket:
    """Returns a non-blocking socket in the current namespace that the pod's rules recognise as ztunnel's."""
    fresh = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, names.ZTUNNEL_MARK)
        if kind == socket.SOCK_STREAM:  # accepted sockets inherit these options from their listener
            fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keepalive.probe_by_default(fresh)
            fresh.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    except BaseException:
        fresh.close()
        raise
    return fresh


def mark_returned(connecting: socket.socket) -> None:
    """Lets the other processes that serve the pod see that the connection has come back once.

    Call it before the socket connects, or another process may accept the connection first and pass it on once more.
    """
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, names.ZTUNNEL_MARK | _RETURNED)


def returns_elsewhere(diag: SockDiag, local: Address, remote: Address) -> int | None:
    """Returns how often a connection that another process of ztunnel has opened came back before.

    Returns None if ztunnel has no such connection. Rules change the mark of packets, not of the socket.
    """
    with contextlib.suppress(KernelError):
        found = diag.find(local[:2], remote[:2])
        if found is not None and found.of_ztunnel:
            return int(bool((found.mark or 0) & _RETURNED))
    return None


def take_source(fresh: socket.socket, source: Address, port: int) -> None:
    """Binds the socket to the client's address, which is not one of this namespace. Raises OSError."""
    if len(source) == 2:
        fresh.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    else:
        fresh.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one port towards several destinations
    fresh.bind((source[0], port, *source[2:]))


def keep_source(fresh: socket.socket, source: Address, port: int) -> None:
    """Binds the socket to `source`, an address of this namespace; `port` 0 for any. Raises OSError."""
    if port:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        fresh.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    fresh.bind((source[0], port, *source[2:]))


def reset(connected: socket.socket) -> None:
    """Closes with a RST instead of a FIN, so that the peer sees a failure, not an orderly end."""
    try:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    except OSError:
        pass  # the connection is gone already
    finally:
        connected.close()


def shut(connected: socket.socket, close: str) -> None:
    """Closes the socket of a connection that ended by `close` (see records): orderly only for fin."""
    if close == "fin":
        connected.close()
    else:
        reset(connected)
