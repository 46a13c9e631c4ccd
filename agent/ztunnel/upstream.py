"""Sockets made inside a pod's namespace, marked as ztunnel's, ready to connect.

Entering a namespace costs more than making a socket, so a few are made at each entry. A pod that opens no
connections holds none.

A socket that speaks with a client's address must not take a port that the client itself may use towards the
same destination: in the pod's conntrack both would be one flow, and the later of the two hangs. A client's
kernel takes its ports from 32768 up (Linux's default; others start higher), so ours are below.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct

from agent.core import names
from agent.kernel.netns import Netns
from agent.ztunnel.original import Address

BATCH = 16
FIRST_PORT, LAST_PORT = 1024, 32767
TRIES = 64  # ports in use or in TIME_WAIT are passed over
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h


class Upstream:
    """Stock of fresh, non-blocking, marked sockets of one pod."""

    def __init__(self, netns: Netns) -> None:
        self._netns = netns
        self._stock: dict[tuple[int, int], list[socket.socket]] = {}
        # Anywhere, so that an instance that takes over does not walk through its predecessor's ports.
        self._port = random.randint(FIRST_PORT, LAST_PORT)

    def take(self, destination: Address, kind: int) -> socket.socket:
        """A socket of the destination's family; the caller owns it. Raises OSError or NetnsError."""
        family = socket.AF_INET if len(destination) == 2 else socket.AF_INET6
        stock = self._stock.setdefault((family, kind), [])
        if not stock:
            self._netns.call(lambda: self._make(family, kind, stock))
        return stock.pop()

    def connect(self, destination: Address) -> socket.socket:
        """A socket that connects, as ztunnel. Raises OSError or NetnsError."""
        fresh = self.take(destination, socket.SOCK_STREAM)
        failed = fresh.connect_ex(destination)
        if failed not in (0, errno.EINPROGRESS):
            fresh.close()
            raise OSError(failed, os.strerror(failed))
        return fresh

    def connect_as(self, source: Address, destination: Address) -> socket.socket:
        """A socket that connects with the address, not the port, of `source`. Raises as `connect` does."""
        for _ in range(TRIES):
            fresh = self.take(destination, socket.SOCK_STREAM)
            try:
                take_source(fresh, source, self._next_port())
                failed = fresh.connect_ex(destination)
                if failed in (0, errno.EINPROGRESS):
                    return fresh
                raise OSError(failed, os.strerror(failed))
            except OSError as error:
                fresh.close()
                if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                    raise
        raise OSError(errno.EADDRNOTAVAIL, f"no port free for {source[0]} in {TRIES} tries")

    def _next_port(self) -> int:
        self._port = self._port + 1 if self._port < LAST_PORT else FIRST_PORT
        return self._port

    def _make(self, family: int, kind: int, stock: list[socket.socket]) -> None:
        for _ in range(BATCH if kind == socket.SOCK_STREAM else BATCH // 4):
            stock.append(marked(family, kind))

    def close(self) -> None:
        for stock in self._stock.values():
            for fresh in stock:
                fresh.close()
        self._stock.clear()


def marked(family: int, kind: int) -> socket.socket:
    """A non-blocking socket in the current namespace that the pod's rules know as ztunnel's."""
    fresh = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, names.ZTUNNEL_MARK)
        if kind == socket.SOCK_STREAM:
            fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        fresh.close()
        raise
    return fresh


def take_source(fresh: socket.socket, source: Address, port: int) -> None:
    """Lets the socket speak with the client's address, which is not one of this namespace. Raises OSError."""
    if len(source) == 2:
        fresh.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    else:
        fresh.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one port towards several destinations
    fresh.bind((source[0], port, *source[2:]))


def reset(connected: socket.socket) -> None:
    """Closes with a RST instead of a FIN, so that the peer sees failure, not an orderly end."""
    try:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    except OSError:
        pass  # gone already; closing is all that is left
    finally:
        connected.close()
