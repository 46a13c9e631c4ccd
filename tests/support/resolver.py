# SPDX-License-Identifier: Apache-2.0
"""A DNS server that answers by the first label of the name, and a client of it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from ipaddress import ip_address

from agent.kernel.netns import Netns

ADDRESS = "192.0.2.7"
CODES = {"broken": 2, "absent": 3, "denied": 5}  # other names exist; "silent" gets no answer
SECONDS = 10


def query(name: bytes | str, number: int = 1, kind: int = 1) -> bytes:
    labels = name.split(b".") if isinstance(name, bytes) else name.encode().split(b".")
    asked = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + asked + struct.pack(">HH", kind, 1)


def answer(asked: bytes, code: int = 0, *addresses: str, ttl: int = 60) -> bytes:
    """The answer to a query with one question and nothing else."""
    records = b""
    for one in map(ip_address, addresses):
        kind = 1 if one.version == 4 else 28
        records += struct.pack(">HHHIH", 0xC00C, kind, 1, ttl, len(one.packed)) + one.packed
    return asked[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(addresses), 0, 0) + asked[12:] + records


def respond(asked: bytes) -> bytes | None:
    first = asked[13 : 13 + asked[12]].decode(errors="replace") if len(asked) > 12 else "silent"
    if first == "silent":
        return None
    code = CODES.get(first, 0)
    return answer(asked, code, *([] if code else [ADDRESS]))


class Resolver(threading.Thread):
    """Serves UDP and TCP on port 53 of the addresses, until closed; by TCP one query per connection."""

    def __init__(self, netns: Netns, *addresses: str) -> None:
        super().__init__(daemon=True)
        self._selector = selectors.DefaultSelector()
        self._end, self._ended = socket.socketpair()
        self._selector.register(self._ended, selectors.EVENT_READ)
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                made = netns.call(lambda family=family, kind=kind: socket.socket(family, kind))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind((address, 53))
                if kind == socket.SOCK_STREAM:
                    made.listen()
                self._selector.register(made, selectors.EVENT_READ)
        self.start()

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._ended:
                    return
                with contextlib.suppress(OSError):
                    self._serve(sock)

    @staticmethod
    def _serve(sock: socket.socket) -> None:
        if sock.type == socket.SOCK_DGRAM:
            asked, client = sock.recvfrom(4096)
            if said := respond(asked):
                sock.sendto(said, client)
            return
        connection, _ = sock.accept()
        with connection:
            connection.settimeout(SECONDS)
            if said := respond(connection.recv(4096)[2:]):
                connection.sendall(len(said).to_bytes(2) + said)

    def close(self) -> None:
        self._end.send(b"x")
        self.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._end.close()
        self._selector.close()


def ask(netns: Netns, resolver: str, name: bytes | str, *, connected: bool = True, tcp: bool = False) -> bytes:
    """The answer; b"" for "silent", which is not waited for."""
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    asked = query(name)
    with netns.call(lambda: socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)) as client:
        client.settimeout(SECONDS)
        if connected or tcp:
            client.connect((resolver, 53))
            client.sendall(len(asked).to_bytes(2) + asked if tcp else asked)
        else:
            client.sendto(asked, (resolver, 53))
        silent = name.startswith("silent" if isinstance(name, str) else b"silent")
        return b"" if silent else client.recv(4096)
