# SPDX-License-Identifier: Apache-2.0
"""A server that echoes, and clients that open one connection after the other, with ztunnel between them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from typing import Self

from support.ztunnel import PEER4, POD4, SECONDS, Lab, Place, read_all


class Echo:
    """Answers every connection to it until closed, and two clients, which pause after each one."""

    def __init__(self, server: Place, client: Place, host: str, port: int = 8080, *, pause: float = 0.0) -> None:
        self.client, self.host, self.port, self.pause = client, host, port, pause
        self.listener = server.listen(host, port)
        self.failures: list[str] = []
        self.done = itertools.count()
        self.made = 0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=what) for what in (self.serve, self.ask, self.ask)]
        for thread in self.threads:
            thread.start()

    @classmethod
    def through(cls, lab: Lab, inbound: bool) -> Self:
        server, client, host = (lab.pod, lab.peer, POD4) if inbound else (lab.peer, lab.pod, PEER4)
        return cls(server, client, host)

    def serve(self) -> None:
        while True:  # until the listener is shut: after the clients, which must all get their answer
            try:
                end, _ = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with end, contextlib.suppress(OSError):  # the client says what has failed
                end.sendall(end.recv(100))

    def ask(self) -> None:
        while not self.stop.is_set():
            try:
                with self.client.connect(self.host, self.port) as end:
                    end.sendall(b"hello")
                    if read_all(end) != b"hello":
                        self.failures.append("cut short")
            except OSError as error:
                self.failures.append(repr(error))
            self.made = next(self.done)
            self.stop.wait(self.pause)

    def wait_more(self, number: int) -> None:
        until, wanted = time.monotonic() + SECONDS, self.made + number
        while self.made < wanted and time.monotonic() < until:
            time.sleep(0.01)
        assert self.made >= wanted

    def close(self) -> None:
        self.stop.set()
        for thread in self.threads[1:]:
            thread.join(SECONDS)
        self.listener.shutdown(socket.SHUT_RDWR)
        self.threads[0].join(SECONDS)
        self.listener.close()
