# SPDX-License-Identifier: Apache-2.0
"""A pod with its rules and a real ztunnel, the collector of inet_diag, and applications that count for themselves."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.node import until
from support.ztunnel import SECONDS, Lab, Place, labs, read_all

from agent.core.model.redirect import Redirect
from agent.flows.inet_diag.collector import DiagCollector
from agent.flows.record import Connection, Delta, Direction, Fate, Reason
from agent.kernel.pod_netns import PodNetns

OUT, IN = Direction.OUTBOUND, Direction.INBOUND
EVERYTHING = Redirect()


@dataclass
class Watched:
    """A pod with its rules, a real ztunnel, and the collector; `told` are the records until now."""

    lab: Lab
    target: PodNetns
    collector: DiagCollector
    told: list[Connection] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)

    @property
    def pod(self) -> int:
        return self.target.netns.id.cookie

    def enrol(self, want: Redirect = EVERYTHING, *, captured: bool = True) -> None:
        self.collector.enrol(self.target, want, captured=captured)

    def read(self) -> list[Connection]:
        self.told += self.collector.records()
        return self.told

    def refresh(self) -> list[Connection]:
        self.deltas += self.collector.refresh()[0]
        return self.collector.live()

    def records(self, count: int, ztunnel: int = 0) -> list[Connection]:
        """Exactly so many, with all that was held back, when so many of ztunnel's sockets have ended too."""

        def ended() -> bool:
            self.refresh()
            return len(self.read()) >= count and self.sum("closed", reason=Reason.ZTUNNEL) >= ztunnel

        until(ended, f"{count} records", seconds=SECONDS)
        self.finish()
        assert len(self.told) == count, [(str(one.local), str(one.remote), one.fate.word) for one in self.told]
        return self.told

    def finish(self) -> None:
        """Nothing is held back any more."""
        self.collector.release(self.pod)
        self.read()
        self.refresh()

    def record(self, local: socket.socket | tuple[Any, ...]) -> Connection:
        name = local.getsockname()[:2] if isinstance(local, socket.socket) else local
        return until(lambda: next((one for one in self.read() if one.local == name), None), f"a record of {name}")

    def sum(self, what: str, **wanted: Any) -> int:
        fitting = (one for one in self.deltas if all(getattr(one, key) == value for key, value in wanted.items()))
        return sum(getattr(one, what) for one in fitting)


def held_by(process: Callable[[], int]) -> Callable[[Collection[int]], Collection[int]]:
    def held(inodes: Collection[int]) -> Collection[int]:
        found = set()
        ztunnel = psutil.Process(process())  # its workers hold the connections
        for each in (ztunnel, *ztunnel.children(recursive=True)):
            for one in Path(f"/proc/{each.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    found.add(str(one.readlink()))
        return [inode for inode in inodes if f"socket:[{inode}]" in found]

    return held


@dataclass
class Counted:
    """What one end sent and received."""

    sent: int
    received: int


class Talk:
    """A server that answers each connection with a random amount, and clients; both count for themselves."""

    def __init__(self, server: Place, address: str, port: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.listener = server.listen(address, port)
        self.clients: dict[tuple[Any, ...], Counted] = {}
        self.servers: dict[tuple[Any, ...], Counted] = {}
        self.doubtful: set[tuple[Any, ...]] = set()  # where the server did not wait for the FIN

    def serve(self, count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._answer, args=(self.random.random(),)) for _ in range(count)]
        for one in threads:
            one.start()
        return threads

    def _answer(self, choice: float) -> None:
        end, peer = self.listener.accept()
        with end:
            end.settimeout(SECONDS)
            size = int.from_bytes(recv(end, 4), "big")
            wanted = int.from_bytes(recv(end, 4), "big")
            got = 8 + len(recv(end, size))
            if choice < 0.3:  # the server closes first, without waiting for the client's FIN
                end.sendall(bytes(wanted))
            else:
                if choice < 0.6:  # the client's half is closed before the answer goes
                    assert recv_all(end) == 0
                end.sendall(bytes(wanted))
            self.servers[peer[:2]] = Counted(wanted, got)
            if not 0.3 <= choice < 0.6:
                self.doubtful.add(peer[:2])

    def client(self, place: Place, address: str, port: int, threads: list[threading.Thread]) -> None:
        size, wanted = (self.random.choice((0, 1, self.random.randrange(200_000))) for _ in range(2))
        with place.connect(address, port) as end:
            name = end.getsockname()[:2]
            end.sendall(size.to_bytes(4, "big") + wanted.to_bytes(4, "big") + bytes(size))
            end.shutdown(socket.SHUT_WR)
            assert len(read_all(end)) == wanted
            self.clients[name] = Counted(size + 8, wanted)


def recv(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = end.recv(size - len(found))
        assert part
        found += part
    return found


def recv_all(end: socket.socket) -> int:
    return len(read_all(end))


@contextmanager
def watched_pod(folder: Path) -> Iterator[Watched]:
    with labs(folder) as lab:
        lab.serve()
        target = PodNetns(lab.pod.netns)
        made = Watched(lab, target, DiagCollector(held_by(lambda: lab.ztunnel.process.pid)))
        yield made
        made.collector.close()
        # The namespace's handle is the lab's.


def exempt(one: Connection) -> tuple[Direction, Fate, Reason]:
    return one.direction, one.fate, one.reason
