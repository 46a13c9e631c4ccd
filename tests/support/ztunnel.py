# SPDX-License-Identifier: Apache-2.0
"""A pod and a peer in namespaces, the pod's redirection rules, a small agent for ZDS, a real ztunnel."""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from support.istio import route_marked

from agent.kernel.exec import run, start
from agent.kernel.netns import Netns
from agent.lab.links import NO_DAD, Port, add_namespace, join, remove_namespace
from agent.zds.messages import Ack, Add, Request, SnapshotSent, decode_hello, decode_response, encode

POD4, PEER4, RESOLVER4 = "10.77.0.2", "10.77.0.1", "10.77.0.53"
POD6, PEER6, RESOLVER6 = "fd77::2", "fd77::1", "fd77::53"
SECONDS = 20.0
_numbers = itertools.count()

# docs/design/istio-cni.md, 2.6, with DNS and IPv6
NFT = """
table inet istio-ambient-nat {
  chain istio-prerouting {
    meta l4proto tcp ip saddr 169.254.7.127 counter accept
    ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006
    ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006
  }
  chain istio-output {
    meta l4proto tcp ip daddr 169.254.7.127 counter accept
    oifname != "lo" meta mark & 0xfff != 0x539 udp dport 53 counter redirect to :15053
    ip daddr != 127.0.0.1 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053
    ip6 daddr != ::1 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053
    meta l4proto tcp meta mark & 0xfff == 0x111 counter accept
    oifname "lo" ip daddr != 127.0.0.1 counter accept
    oifname "lo" ip6 daddr != ::1 counter accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 counter redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 counter redirect to :15001
  }
  chain prerouting { type nat hook prerouting priority -100; jump istio-prerouting; }
  chain output { type nat hook output priority -100; jump istio-output; }
}
table inet istio-ambient-mangle {
  chain istio-prerouting {
    meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain istio-output { ct mark & 0xfff == 0x111 counter meta mark set ct mark; }
  chain prerouting { type filter hook prerouting priority -150; jump istio-prerouting; }
  chain output { type route hook output priority -150; jump istio-output; }
}
table inet istio-ambient-raw {
  chain istio-prerouting { udp sport 53 meta mark & 0xfff != 0x539 counter ct zone set 1; }
  chain istio-output { udp dport 53 meta mark & 0xfff == 0x539 counter ct zone set 1; }
  chain prerouting { type filter hook prerouting priority -300; jump istio-prerouting; }
  chain output { type filter hook output priority -300; jump istio-output; }
}
"""


class Place:
    """A namespace of the test; `make` makes a socket in it."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, Path("/run/netns") / name
        add_namespace(name, NO_DAD)  # so that link-local addresses too are usable at once
        self.netns = Netns.open(self.path)

    def call(self, function: Callable[[], Any]) -> Any:
        return self.netns.call(function)

    def make(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        made: socket.socket = self.call(lambda: socket.socket(family, kind))
        made.settimeout(SECONDS)
        return made

    def listen(self, host: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        made = self.make(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        if kind == socket.SOCK_STREAM:
            made.listen(4096)
        return made

    def connect(self, host: str, port: int) -> socket.socket:
        made = self.make(socket.AF_INET6 if ":" in host else socket.AF_INET)
        made.connect((host, port))
        return made

    def remove(self) -> None:
        self.netns.close()
        remove_namespace(self.name)


@contextlib.contextmanager
def places() -> Iterator[tuple[Place, Place]]:
    """(pod, peer), joined by a veth pair; the pod's rules are in."""
    number = f"slu-zt-{os.getpid()}-{next(_numbers)}"
    with contextlib.ExitStack() as made:
        pod = Place(f"{number}-pod")
        made.callback(pod.remove)
        peer = Place(f"{number}-peer")
        made.callback(peer.remove)
        far = (f"{PEER4}/24", f"{RESOLVER4}/24", f"{PEER6}/64", f"{RESOLVER6}/64")
        join(Port(pod.name, "eth0", (f"{POD4}/24", f"{POD6}/64")), Port(peer.name, "eth0", far))
        route_marked(pod.name)
        run(["nft", "-f", "-"], stdin=NFT, netns=pod.path)
        yield pod, peer


class Agent:
    """The agent's end of ZDS: accepts one ztunnel after the other, asks, and waits for each answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._listener.settimeout(SECONDS)
        self.link = socket.socket()  # the newest ztunnel

    def accept(self) -> socket.socket:
        self.link, _ = self._listener.accept()
        self.link.settimeout(SECONDS)
        assert decode_hello(self.link.recv(1024)).version == 1
        return self.link

    def ask(self, request: Request, fds: tuple[int, ...] = (), link: socket.socket | None = None) -> str:
        return self.ask_raw(encode(request), fds, link)

    def ask_raw(self, data: bytes, fds: tuple[int, ...] = (), link: socket.socket | None = None) -> str:
        """The error in the acknowledgement; empty when it was done."""
        link = link or self.link
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        link.sendmsg([data], control)
        answer = decode_response(link.recv(1024))
        assert isinstance(answer, Ack)
        return answer.error

    def add(self, place: Place, uid: str = "uid-1") -> str:
        return self.ask(Add(uid, "web", "shop", "default"), (place.netns.fd,))

    def accept_with(self, place: Place) -> socket.socket:
        """A new ztunnel gets a snapshot of one pod."""
        link = self.accept()
        assert self.add(place) == ""
        assert self.ask(SnapshotSent()) == ""
        return link

    def close(self) -> None:
        self.link.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)


class Ztunnel:
    """The real process. `records` reads what it has written so far."""

    def __init__(
        self, socket_path: Path, records: Path, drain: float = 5.0, settings: str = "", first: str = ""
    ) -> None:
        """Takes code to run `first`."""
        self.path = records
        code = (
            f"{first}\nimport sys\nfrom agent.ztunnel.app import main\n"
            "from agent.ztunnel.ztunnel_settings import ZtunnelSettings\n"
            f"sys.exit(main(ZtunnelSettings(zds_socket={str(socket_path)!r}, records={str(records)!r},"
            f" drain_seconds={drain}, {settings})))"
        )
        with Path(f"{records}.err").open("ab") as errors:
            self.process: subprocess.Popen[bytes] = start([sys.executable, "-c", code], stderr=errors)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def wait_record(self, **wanted: object) -> dict[str, Any]:
        """The first record with these values; waits for it."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for record in self.records():
                if all(record.get(key) == value for key, value in wanted.items()):
                    return record
            time.sleep(0.02)
        raise AssertionError(f"no record with {wanted} in {self.records()}")

    def memory(self) -> int:
        """Resident bytes of all of its processes, what they share counted for each."""
        return sum(one.memory_info().rss for one in self._processes())

    def fds(self) -> int:
        """Descriptors of all of its processes."""
        return sum(one.num_fds() for one in self._processes())

    def _processes(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children()]

    def workers(self) -> dict[int, int]:
        """How many descriptors each worker has, by process id."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                found[child.pid] = child.num_fds()
        return found

    def kill_worker(self) -> None:
        """Kills one, and waits until it is replaced."""
        before = self.workers()
        killed = next(iter(before))
        os.kill(killed, signal.SIGKILL)
        until = time.monotonic() + SECONDS
        while len(now := self.workers()) < len(before) or killed in now:
            assert time.monotonic() < until, "the worker is not replaced"
            time.sleep(0.01)

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)


class Lab:
    """One pod, its peer and the agent; `start` makes `ztunnel`, the newest of the real processes."""

    def __init__(self, pod: Place, peer: Place, folder: Path, made: contextlib.ExitStack) -> None:
        self.pod, self.peer, self.folder, self._made = pod, peer, folder, made
        self.agent = Agent(folder / "zds.sock")
        made.callback(lambda: self.agent.close())

    def start(self, name: str = "records", drain: float = 5.0, settings: str = "", first: str = "") -> Ztunnel:
        ztunnel = Ztunnel(self.folder / "zds.sock", self.folder / name, drain, settings, first)
        self._made.callback(ztunnel.close)
        self.ztunnel = ztunnel
        return ztunnel

    def serve(self, name: str = "records", drain: float = 5.0, settings: str = "", first: str = "") -> Ztunnel:
        """Starts a ztunnel and hands it the pod."""
        self.start(name, drain, settings, first)
        self.agent.accept_with(self.pod)
        return self.ztunnel

    def close_later(self, *sockets: socket.socket) -> None:
        for one in sockets:
            self._made.callback(one.close)

    def outbound(self, host: str = PEER4, port: int = 8080) -> tuple[socket.socket, socket.socket]:
        """(the pod's end, the server's end) of a connection from the pod to the peer."""
        return self._pair(self.pod, self.peer, host, port)

    def inbound(self, host: str = POD4, port: int = 8080) -> tuple[socket.socket, socket.socket]:
        """(the peer's end, the application's end) of a connection from the peer to the pod."""
        return self._pair(self.peer, self.pod, host, port)

    def _pair(self, one: Place, other: Place, host: str, port: int) -> tuple[socket.socket, socket.socket]:
        with other.listen(host, port) as listener:
            client = one.connect(host, port)
            server, _ = listener.accept()
        server.settimeout(SECONDS)
        self.close_later(client, server)
        return client, server


@contextlib.contextmanager
def labs(folder: Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as made:
        pod, peer = made.enter_context(places())
        yield Lab(pod, peer, folder, made)


def read_all(end: socket.socket) -> bytes:
    """Everything up to the FIN."""
    parts = []
    while part := end.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def abort(end: socket.socket) -> None:
    """Closes with a RST."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    end.close()


def read(end: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = end.recv(size - len(parts))
        assert part
        parts += part
    return bytes(parts)


def question(number: int) -> bytes:
    """A query for the address of a.test."""
    return number.to_bytes(2) + b"\1\0\0\1\0\0\0\0\0\0\1a\4test\0\0\1\0\1"


def wait_listening(place: Place, listening: bool, host: str = "127.0.0.1", port: int = 15001) -> None:
    """Waits until a direct connection to ztunnel's own port is taken or refused."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with place.make() as probe:
            taken = probe.connect_ex((host, port)) == 0
        if taken == listening:
            return
        time.sleep(0.02)
    raise AssertionError(f"{host}:{port} listening is not {listening}")
