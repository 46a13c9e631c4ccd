# SPDX-License-Identifier: Apache-2.0
"""Processes that hold sockets for a test: ztunnels, or what a pod itself runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from support.ztunnel import SECONDS, Place

from agent.kernel.exec import start
from agent.kernel.process import Process

# Keeps each socket that it is sent, tells its number, and closes or moves descriptors when told to. Lives on when its
# connection ends, as a draining ztunnel does.
_CHILD = """
import os, signal, socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(sys.argv[1])
while True:
    data, kept, _, _ = socket.recv_fds(link, 100, 8)
    if not data:
        signal.pause()
    word, *numbers = data.decode().split()
    numbers = [int(number) for number in numbers]
    if word == "close":
        os.close(*numbers)
    if word == "move":
        os.dup2(*numbers)
        os.close(numbers[0])
    link.send(" ".join(map(str, kept or [0])).encode())
"""


class Holder:
    """One such process, started and connected."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        path = folder / "holder.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(SECONDS)
            self.running: subprocess.Popen[bytes] = start([*prefix, sys.executable, "-c", _CHILD, str(path)])
            try:
                self.link, _ = listener.accept()
            except BaseException:
                self.end()
                raise
            finally:
                path.unlink()
        self.link.settimeout(SECONDS)
        self.pid = self.running.pid

    def process(self) -> Process:
        """A new handle, as the agent makes it."""
        return Process.of_peer(self.link)

    def keep(self, made: socket.socket) -> int:
        """Hands over a socket, ours is closed. The number that it has there."""
        with made:
            socket.send_fds(self.link, [b"keep"], [made.fileno()])
        return int(self.link.recv(100))

    def tell(self, *words: object) -> None:
        self.link.send(" ".join(map(str, words)).encode())
        self.link.recv(100)

    def die(self) -> None:
        """It has ended, and nobody has reaped it."""
        os.kill(self.running.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.running.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        if self.running.poll() is None:
            self.running.kill()
        self.running.wait(SECONDS)
        if hasattr(self, "link"):
            self.link.close()


def shared(place: Place, host: str, port: int, *, mark: int = 0, listening: bool = True) -> socket.socket:
    """A socket that others may listen beside (SO_REUSEPORT)."""
    made = place.make(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind((host, port))
    if listening:
        made.listen(16)
    return made


def cookie(made: socket.socket) -> int:
    return int.from_bytes(made.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)
