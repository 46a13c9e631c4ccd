# SPDX-License-Identifier: Apache-2.0
"""A pod that the eBPF backend captures, its peer, and this process as its ztunnel with real listeners."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from support.ebpf import EbpfNode
from support.rules import Pod
from support.rules import pod as namespace

from agent.backends.ebpf.abi import ExitCause
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.names import DNS_PORT, INBOUND_PORT, OUTBOUND_PORT, ZTUNNEL_MARK
from agent.kernel.bpf.map import Map
from agent.kernel.exec import run
from agent.lab.links import NO_DAD, Port, join
from agent.reconciler.converge import settle

POD = {4: "10.77.0.2", 6: "fd77::2"}
PEER = {4: "10.77.0.1", 6: "fd77::1"}
OTHER = {4: "10.77.0.9", 6: "fd77::9"}  # of the peer, too
RESOLVERS = {4: ("10.77.0.53", "10.77.0.54"), 6: ("fd77::53", "fd77::54")}
BY_NUMBER = [{version: RESOLVERS[version][n] for version in RESOLVERS} for n in (0, 1)]
APP, FREE, DNS = 8080, 6379, 53  # FREE is the port that CAPTURE leaves alone
SECONDS = 10.0  # until what should come counts as not come
SO_ORIGINAL_DST, IPV6_TRANSPARENT, IP_TRANSPARENT = 80, 75, 19  # linux/netfilter_ipv4.h, linux/in6.h, linux/in.h
CAPTURE = Redirect(exclude=Exclusions(outbound_ports=((FREE, FREE),)))
KINDS = ("IPv4", "IPv6", "mapped")
Where = tuple[str, int]


def family(kind: str) -> int:
    return 6 if kind == "IPv6" else 4


def domain(kind: str) -> int:
    return socket.AF_INET if kind == "IPv4" else socket.AF_INET6


def written(kind: str, host: str) -> str:
    """As a socket of that kind has to be told it."""
    return f"::ffff:{host}" if kind == "mapped" else host


class Namespace:
    """Makes sockets inside of a pod's namespace."""

    def __init__(self, pod: Pod) -> None:
        self.pod, self.target, self.name, self.path, self.sh = pod, pod.target, pod.name, pod.path, pod.sh
        self.cookie: int = pod.target.netns.id.cookie

    def call(self, function: Callable[[], Any]) -> Any:
        return self.target.netns.call(function)

    def make(self, kind: str = "IPv4", type_: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        made: socket.socket = self.call(lambda: socket.socket(domain(kind), type_, protocol))
        made.settimeout(SECONDS)
        return made

    def listen(
        self, port: int, *, mark: int = 0, type_: int = socket.SOCK_STREAM, reuse: bool = False
    ) -> socket.socket:
        """For both families. `mark` makes it as a ztunnel's, `reuse` sets SO_REUSEPORT."""
        made = self.make("IPv6", type_)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if mark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        if type_ == socket.SOCK_DGRAM:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        made.bind(("::", port))
        if type_ == socket.SOCK_STREAM:
            made.listen(4096)
        return made


class Ztunnel:
    """The listeners of a ztunnel in one pod, held by this process."""

    def __init__(self, pod: Namespace, *, reuse: bool = False) -> None:
        self.outbound = pod.listen(OUTBOUND_PORT, mark=ZTUNNEL_MARK, reuse=reuse)
        self.inbound = pod.listen(INBOUND_PORT, mark=ZTUNNEL_MARK, reuse=reuse)
        self.dns_tcp = pod.listen(DNS_PORT, mark=ZTUNNEL_MARK, reuse=reuse)
        self.dns = pod.listen(DNS_PORT, mark=ZTUNNEL_MARK, type_=socket.SOCK_DGRAM, reuse=reuse)

    def close(self) -> None:
        for one in (self.outbound, self.inbound, self.dns_tcp, self.dns):
            one.close()


class Stage:
    """Node, pod, peer and ztunnel; the peer listens at APP, at FREE and, as a resolver, at DNS."""

    def __init__(self, made: contextlib.ExitStack, name: str, want: Redirect, *, ztunnel: bool) -> None:
        self.want = want
        self.node = EbpfNode()
        made.callback(self.node.close)
        self.pod, self.peer = pair(made, name)
        self.ztunnel = Ztunnel(self.pod) if ztunnel else cast(Ztunnel, None)
        if ztunnel:
            made.callback(self.ztunnel.close)
        self.app, self.free = self.peer.listen(APP), self.peer.listen(FREE)
        self.resolver = self.peer.listen(DNS, type_=socket.SOCK_DGRAM)
        for each in (self.app, self.free, self.resolver):
            made.callback(each.close)
        self.settle()

    def settle(self, want: Redirect | None = None) -> None:
        self.want = want or self.want
        settle(self.pod.target, self.want, self.node.layers)

    def exits(self, cause: ExitCause) -> int:
        """How often the programs went that way out, on all CPUs."""
        with Map.open(self.node.pins.maps / "exits") as exits:
            values = exits.lookup_percpu(struct.pack("=I", cause))
        return sum(struct.unpack("=Q", value)[0] for value in values)

    @contextlib.contextmanager
    def counts(self, cause: ExitCause, times: int | None = None) -> Iterator[None]:
        """What runs inside goes that way out: `times`, or at least once."""
        before = self.exits(cause)
        yield
        added = self.exits(cause) - before
        assert added == times if times is not None else added, f"{cause.name}: {added}"


@contextlib.contextmanager
def stage(want: Redirect = CAPTURE, *, name: str = "slu-eb", ztunnel: bool = True) -> Iterator[Stage]:
    """Without `ztunnel` nobody listens in the pod, though this process counts as a ztunnel."""
    with contextlib.ExitStack() as made:
        yield Stage(made, name, want, ztunnel=ztunnel)


def pair(made: contextlib.ExitStack, name: str) -> tuple[Namespace, Namespace]:
    """Pod and peer, joined."""
    token = os.urandom(2).hex()
    names = (f"{name}-{token}{end}" for end in "ab")
    pod, peer = (Namespace(made.enter_context(namespace(one, NO_DAD))) for one in names)
    near, far = ([f"{host[4]}/24", f"{host[6]}/64"] for host in (POD, PEER))
    for host in (OTHER, *BY_NUMBER):
        far += [f"{host[4]}/24", f"{host[6]}/64"]
    join(Port(pod.name, "eth0", tuple(near), (PEER[4], PEER[6])), Port(peer.name, "eth0", tuple(far)))
    return pod, peer


def accepted(listener: socket.socket) -> socket.socket:
    """The next connection; TimeoutError when none comes."""
    made, _ = listener.accept()
    made.settimeout(SECONDS)
    return made


def waiting(listener: socket.socket) -> bool:
    """Whether something is there to be taken now."""
    return bool(select.select([listener], [], [], 0)[0])


def forget(stage: Stage) -> None:
    """Nothing of what came before is left waiting."""
    for listener in (stage.ztunnel.outbound, stage.ztunnel.inbound, stage.ztunnel.dns_tcp, stage.app, stage.free):
        while waiting(listener):
            listener.accept()[0].close()
    for sock in (stage.ztunnel.dns, stage.resolver):
        while waiting(sock):
            sock.recv(1000)


def original(sock: socket.socket, version: int, size: int = 128) -> Where:
    """What SO_ORIGINAL_DST answers. Raises OSError."""
    return read_address(sock.getsockopt(socket.SOL_IP if version == 4 else 41, SO_ORIGINAL_DST, size))


def read_address(data: bytes) -> Where:
    """Of a struct sockaddr_in or sockaddr_in6, of exactly its size."""
    kind, port = struct.unpack("=H", data[:2])[0], struct.unpack(">H", data[2:4])[0]
    assert len(data) == {socket.AF_INET: 16, socket.AF_INET6: 28}[kind], data
    return socket.inet_ntop(kind, data[4:8] if kind == socket.AF_INET else data[8:24]), port


def plain(where: Any) -> Where:
    """An address of Python's socket module without the rest, IPv4 as such."""
    return where[0].removeprefix("::ffff:"), where[1]


def carries(left: socket.socket, right: socket.socket) -> None:
    for sender, receiver in ((left, right), (right, left)):
        sender.sendall(b"hello")
        assert receiver.recv(5, socket.MSG_WAITALL) == b"hello"


def from_client(stage: Stage, kind: str, port: int = APP) -> tuple[socket.socket, socket.socket]:
    """A connection from the peer towards the pod, and ztunnel's end of it."""
    near = stage.peer.make(kind)
    near.connect((written(kind, POD[family(kind)]), port))
    return near, accepted(stage.ztunnel.inbound)


def program(path: Path, script: str, *argv: str) -> str:
    """Runs Python in a process of its own in that namespace; what it printed."""
    return run([sys.executable, "-c", script, *argv], netns=path).stdout.strip()


def there(kind: str, host: dict[int, str] = PEER, port: int = APP) -> tuple[str, int]:
    return written(kind, host[family(kind)]), port


def both_ends(node: Stage, kind: str, app: socket.socket, host: dict[int, str] = PEER, port: int = APP) -> None:
    """The application sees what it asked for and its pod's address; ztunnel sees the pod, and is told the rest."""
    version = family(kind)
    with accepted(node.ztunnel.outbound) as inner:
        assert original(inner, version) == (host[version], port)
        assert plain(app.getpeername()) == (host[version], port)
        assert plain(app.getsockname())[0] == POD[version]
        assert plain(inner.getpeername()) == plain(app.getsockname())
        assert plain(inner.getsockname())[1] == OUTBOUND_PORT
        carries(app, inner)
    assert not waiting(node.app), "the peer must not see it"


def answer(server: socket.socket) -> Where:
    """Answers from where it was asked, or from the loopback address that a query was given; who asked."""
    data, ancillary, _, sender = server.recvmsg(100, 100)
    [info] = [value for level, kind, value in ancillary if (level, kind) == (41, socket.IPV6_PKTINFO)]
    here = socket.inet_pton(socket.AF_INET6, sender[0]) if sender[0].startswith("::ffff:127.") else info[:16]
    server.sendmsg([b"re: " + data], [(41, socket.IPV6_PKTINFO, here + bytes(4))], 0, sender)
    return plain(sender)


def speaking(node: Stage, client: str, port: int, where: int = 0) -> socket.socket:
    """ztunnel's socket towards the application, as `client`."""
    version = 6 if ":" in client else 4
    made = node.pod.make("IPv6" if version == 6 else "IPv4")
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
    made.setsockopt(*((41, IPV6_TRANSPARENT, 1) if version == 6 else (socket.SOL_IP, IP_TRANSPARENT, 1)))
    made.bind((client, where))
    made.connect((POD[version], port))
    return made
