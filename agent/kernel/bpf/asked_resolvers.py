# SPDX-License-Identifier: Apache-2.0
"""Finds the resolver of a query in pods that are redirected by eBPF, from the agent's map `resolvers`.

The agent pins the map under its bpf_dir; without it, or without libbpf, the resolver is unknown.
"""

from __future__ import annotations

import logging
import socket
import struct
from pathlib import Path
from typing import Final

from agent.core import names
from agent.core.errors import KernelError
from agent.kernel.bpf.map import Map
from agent.kernel.netns import SO_NETNS_COOKIE

_PIN: Final = "v1/maps/resolvers"
# bpf/abi.h: struct query has the cookie of the namespace, then in network order the port, the protocol, and the
# loopback address that was given to a query; struct resolver has the address, IPv4 as ::ffff:a.b.c.d, and the port
_COOKIE, _REST = struct.Struct("=Q"), struct.Struct(">HBx4s")
_RESOLVER = struct.Struct(">16sH6x")
_MAPPED: Final = bytes(10) + b"\xff\xff"

Endpoint = tuple[str, int]

log = logging.getLogger(__name__)


class Asked:
    """Keeps the map open. For one thread."""

    def __init__(self, bpf_dir: str = names.BPF_DIR) -> None:
        self._pin = Path(bpf_dir) / _PIN
        self._map: Map | None = None
        self._inode = 0  # of the pin, 0 without one: the agent may remove it and make another

    def resolver(self, listener: socket.socket, client: Endpoint) -> Endpoint | None:
        """Returns the resolver of a UDP query of `client` that `listener`, a socket in its namespace, received.

        Returns None if it is unknown. Raises KernelError when the map cannot be read.
        """
        if self._open() is None:
            return None
        return self.of(_COOKIE.unpack(listener.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0], client)

    def of(self, cookie: int, client: Endpoint) -> Endpoint | None:
        """Returns the resolver of a UDP query of `client` in the namespace with that cookie; as resolver()."""
        held = self._open()
        if held is None:
            return None
        value = held.lookup(encode(cookie, client[1], client[0])) if client[0].startswith("127.") else None
        value = held.lookup(encode(cookie, client[1])) if value is None else value
        return None if value is None else decode(value)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _open(self) -> Map | None:
        try:
            inode = self._pin.stat().st_ino
        except OSError:
            inode = 0
        if inode != self._inode:
            self.close()
            self._inode = inode
            if inode:
                try:
                    self._map = Map.open(self._pin)
                except KernelError as error:  # once for each pin, not once for each query
                    log.warning("cannot open map %s, resolvers of redirected pods are unknown: %s", self._pin, error)
        return self._map


def encode(cookie: int, port: int, given: str = "0.0.0.0") -> bytes:
    """Returns the key of a UDP query from the client's `port` in the namespace, with the address it was `given`."""
    return _COOKIE.pack(cookie) + _REST.pack(port, socket.IPPROTO_UDP, socket.inet_aton(given))


def decode(value: bytes) -> Endpoint:
    """Returns the resolver's address and port; IPv4 never v4-mapped."""
    address, port = _RESOLVER.unpack(value)
    if address.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, address[12:]), port
    return socket.inet_ntop(socket.AF_INET6, address), port
