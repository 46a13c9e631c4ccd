# SPDX-License-Identifier: Apache-2.0
"""Connections that a pod of the eBPF backend tries, from this process or from one of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.ebpf_pod import APP, PEER, Namespace, Stage, accepted, carries, family, written

from agent.core.names import ZTUNNEL_MARK
from agent.kernel.exec import start

REFUSED = "ConnectionRefusedError"
# Connects as told, with a mark, and says how that went. The first line lets the test move it first.
DIAL = """
import socket, sys
mark, host, port, bind = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
print("ready", flush=True)
sys.stdin.readline()
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
sock.settimeout(1 if sys.argv[4] else 10)
if mark:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
if bind:
    sock.setsockopt(*((41, 75, 1) if ":" in host else (0, 19, 1)))
    sock.bind((bind, 0))
try:
    sock.connect((host, port))
    print("connected", sock.getpeername()[0], flush=True)
    sys.stdin.readline()
except OSError as error:
    print(type(error).__name__, flush=True)
"""


class Running:
    """A process of the pod's."""

    def __init__(self, where: Path, script: str, *argv: object) -> None:
        full = [sys.executable, "-c", script, *map(str, argv)]
        self._process = start(full, netns=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        if (first := self.line()) != "ready":
            self.end()
            raise AssertionError(f"it has ended: {first}")

    def line(self) -> str:
        assert self._process.stdout
        return str(self._process.stdout.readline().decode().strip())

    def go_on(self) -> str:
        """Tells it to, and reads its next line."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def process(where: Path, script: str, *argv: object) -> Iterator[Running]:
    running = Running(where, script, *argv)
    try:
        yield running
    finally:
        running.end()


def dial(space: Namespace, kind: str, host: dict[int, str], port: int = APP) -> str:
    """Returns "connected", or the error's name."""
    with space.make(kind) as sock:
        try:
            sock.connect((written(kind, host[family(kind)]), port))
        except OSError as error:
            return type(error).__name__
    return "connected"


def as_ztunnel(node: Stage) -> None:
    """Connects to the peer with ztunnel's mark; this process counts as a ztunnel."""
    with node.pod.make() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        sock.connect((PEER[4], APP))
        carries(sock, accepted(node.app))
