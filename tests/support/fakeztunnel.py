# SPDX-License-Identifier: Apache-2.0
"""A ztunnel that speaks ZDS and misbehaves as a test wants."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from support.node import SECONDS

from agent.kernel.netns import Netns
from agent.zds.messages import Ack, Add, Delete, Hello, Message, Request, SnapshotSent, decode_request, encode


def _listener(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("0.0.0.0", port))
    made.listen()
    return made


Answer = Callable[[Request], Message | bytes | None]


class FakeZtunnel(threading.Thread):
    """Speaks ZDS, listens in the pods as ztunnel does, takes no traffic.

    `answer` returns the reply: a message, raw bytes, or None for silence. An `answer` that raises
    ConnectionError ends the connection at that point.
    """

    def __init__(
        self,
        path: Path,
        answer: Answer = lambda _: Ack(),
        hello: bytes = encode(Hello()),
        ports: Sequence[int] = (15001, 15006),
    ) -> None:
        super().__init__(daemon=True)
        self.ports, self.listeners = ports, dict[str, list[socket.socket]]()
        self.answer, self.requests = answer, list[Request]()
        self.complete, self.ended = threading.Event(), threading.Event()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))
        self.socket.send(hello)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            self._serve()
        self.socket.close()
        for uid in list(self.listeners):
            self.deafen(uid)
        self.ended.set()

    def deafen(self, uid: str, *ports: int) -> None:
        """Closes its listeners in the pod: those of `ports`, or all."""
        there = self.listeners.pop(uid, [])
        kept = [one for one in there if ports and one.getsockname()[1] not in ports]
        for one in there:
            if one not in kept:
                one.close()
        if kept:
            self.listeners[uid] = kept

    def _listen(self, descriptor: int) -> list[socket.socket]:
        netns = Netns(os.dup(descriptor), "a pod's")
        try:
            return [netns.call(lambda port=port: _listener(port)) for port in self.ports]
        finally:
            netns.close()

    def _serve(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 2048, 4)
            if not data:
                return
            request = decode_request(data)
            self.requests.append(request)
            reply = self.answer(request)
            if isinstance(request, Add) and descriptors and reply == Ack():
                self.deafen(request.uid)
                self.listeners[request.uid] = self._listen(descriptors[0])
            elif isinstance(request, Delete):
                self.deafen(request.uid)
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(reply, bytes):
                self.socket.send(reply)
            elif reply is not None:
                self.socket.send(encode(reply))
            if isinstance(request, SnapshotSent):
                self.complete.set()

    def added(self) -> list[str]:
        return [request.uid for request in list(self.requests) if isinstance(request, Add)]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.join(SECONDS)
