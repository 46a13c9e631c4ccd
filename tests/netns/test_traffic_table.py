"""One traffic table, run with real packets over every backend: who gets each connection.

A pod namespace and a peer on a veth. On the proxy's ports, and at the real destinations, stand listeners that
answer with their own port and, on the proxy's, the original destination. What comes from outside is crafted and
sniffed with Scapy: who answers a SYN is told by nobody, so each SYN's fate is read from the listeners' accept
queues; a SYN to a closed port is told by its RST.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from support.rules import CHOICES, Pod, layers
from support.rules import pod as made

from agent.core.names import DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, PROBE_IPV4, PROBE_IPV6, ZTUNNEL_MARK
from agent.core.redirect import Redirect
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.reconciler.settle import settle

pytestmark = pytest.mark.root

POD = {4: "10.77.0.2", 6: "fd77::2"}
PEER = {4: "10.77.0.1", 6: "fd77::1"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
PROBE = {4: PROBE_IPV4, 6: PROBE_IPV6}
APP, OTHER = 8080, 9090
WAIT = 2.0  # seconds until something that should come counts as not come; never waited out where it comes


@dataclass(frozen=True)
class Row:
    """`way`: out (a socket of the pod), in (a packet from outside). `gets`: the port whose listener has it."""

    name: str
    way: str
    protocol: str
    target: str  # peer, pod, loopback, probe
    port: int
    gets: int | str  # a port, "refused"
    mark: int = 0
    source: str = ""  # of an inbound packet: peer unless it says probe


ROWS = [
    Row("to another pod", "out", "tcp", "peer", APP, OUTBOUND_PORT),
    Row("to another pod, another port", "out", "tcp", "peer", OTHER, OUTBOUND_PORT),
    Row("to another pod's closed port", "out", "tcp", "peer", 4444, OUTBOUND_PORT),
    Row("to HBONE of another pod", "out", "tcp", "peer", HBONE_PORT, OUTBOUND_PORT),
    Row("of ztunnel itself", "out", "tcp", "peer", APP, APP, mark=ZTUNNEL_MARK),
    Row("of ztunnel, with other mark bits", "out", "tcp", "peer", APP, APP, mark=0xABC000 | ZTUNNEL_MARK),
    Row("with a mark that is not ztunnel's", "out", "tcp", "peer", APP, OUTBOUND_PORT, mark=0x538),
    Row("with the connection's mark", "out", "tcp", "loopback", APP, APP, mark=0x111),
    Row("to loopback", "out", "tcp", "loopback", APP, APP),
    Row("to its own address", "out", "tcp", "pod", APP, APP),
    Row("to its own closed port", "out", "tcp", "pod", 4444, "refused"),
    Row("to the probe address", "out", "tcp", "probe", APP, APP),
    Row("DNS over UDP", "out", "udp", "peer", 53, DNS_PORT),
    Row("DNS over UDP, of ztunnel itself", "out", "udp", "peer", 53, 53, mark=ZTUNNEL_MARK),
    Row("DNS over UDP, to loopback", "out", "udp", "loopback", 53, 53),
    Row("DNS over TCP", "out", "tcp", "peer", 53, DNS_PORT),
    Row("DNS over TCP, of ztunnel itself", "out", "tcp", "peer", 53, 53, mark=ZTUNNEL_MARK),
    Row("DNS over TCP, to loopback", "out", "tcp", "loopback", 53, 53),
    Row("other UDP", "out", "udp", "peer", APP, APP),
    Row("plain", "in", "tcp", "pod", APP, INBOUND_PORT),
    Row("plain, another port", "in", "tcp", "pod", OTHER, INBOUND_PORT),
    Row("plain, closed port", "in", "tcp", "pod", 4444, INBOUND_PORT),
    Row("HBONE", "in", "tcp", "pod", HBONE_PORT, HBONE_PORT),
    Row("to ztunnel's outbound port", "in", "tcp", "pod", OUTBOUND_PORT, INBOUND_PORT),
    Row("a probe of the node", "in", "tcp", "pod", APP, APP, source="probe"),
    Row("a probe, closed port", "in", "tcp", "pod", 4444, "refused", source="probe"),
    Row("UDP", "in", "udp", "pod", APP, APP),
]
TCP_PORTS = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT, APP, OTHER, 53)
UDP_PORTS = (DNS_PORT, APP, 53)


class Side:
    """Listeners in one namespace, ready to say which of them got something."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sockets: dict[tuple[str, int], socket.socket] = {}
        for protocol, ports in (("tcp", TCP_PORTS), ("udp", UDP_PORTS)):
            for port in ports:
                self.sockets[protocol, port] = opened(path, partial(listener, protocol, port))

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()


def opened(path: Path, make) -> socket.socket:  # type: ignore[no-untyped-def]
    with Netns.open(path) as netns:
        return netns.call(make)


def listener(protocol: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)  # what it answers must not be captured
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    if protocol == "tcp":
        sock.listen(64)
    sock.setblocking(False)
    return sock


def client(row: Row, family: int) -> socket.socket:
    kind = socket.SOCK_STREAM if row.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    if row.mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, row.mark)
    sock.settimeout(WAIT)
    return sock


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Pod, Pod]]:
    with joined() as both:
        yield both


@contextlib.contextmanager
def joined() -> Iterator[tuple[Pod, Pod]]:
    """A pod and a peer on one link, the peer holding the probe addresses too."""
    token = os.urandom(2).hex()
    with made(f"slu-tt-{token}a") as pod, made(f"slu-tt-{token}b") as peer:
        pod.sh(f"ip link add eth0 type veth peer name eth0 netns {peer.name}")
        for one, mine, probes in ((pod, POD, ()), (peer, PEER, tuple(PROBE.values()))):
            one.sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
            one.sh("sysctl -qw net.ipv6.conf.eth0.accept_dad=0; ip link set eth0 up")
            one.sh(f"ip addr add {mine[4]}/24 dev eth0; ip addr add {mine[6]}/64 dev eth0 nodad")
            for probe in probes:
                one.sh(f"ip addr add {probe}/{128 if ':' in probe else 32} dev lo")
        pod.sh(f"ip route add {PROBE[4]}/32 via {PEER[4]}; ip route add {PROBE[6]}/128 via {PEER[6]}")
        yield pod, peer


@pytest.fixture(scope="module", params=CHOICES)
def sides(request: pytest.FixtureRequest, pair: tuple[Pod, Pod]) -> Iterator[tuple[str, Side, Side]]:
    """The pod captured by one backend, with listeners on both sides; the rules go away afterwards."""
    pod, peer = pair
    used = layers(request.param)
    settle(pod.target, Redirect(), used)
    inside, outside = Side(pod.path), Side(peer.path)
    yield request.param, inside, outside
    inside.close()
    outside.close()
    settle(pod.target, None, used)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.way}: {row.name}")
def test_row(row: Row, family: int, sides: tuple[str, Side, Side], traffic_table: list[str]) -> None:
    backend, inside, outside = sides
    got, original = (
        send_out(row, family, inside, outside) if row.way == "out" else send_in(row, family, inside, outside)
    )
    note(traffic_table, row, family, backend, got)
    assert got == row.gets
    if row.protocol == "tcp" and got in (OUTBOUND_PORT, INBOUND_PORT, DNS_PORT):
        assert original == row.port, "the original destination is what the proxy is told"


def note(lines: list[str], row: Row, family: int, backend: str, got: int | str) -> None:
    if not lines:
        lines.append(f"{'WAY':4} {'ROW':36} {'FAMILY':6} {'BACKEND':9} {'GOES TO':8} WANTED")
    verdict = "" if got == row.gets else "   <-- WRONG"
    lines.append(f"{row.way:4} {row.name:36} IPv{family:<5} {backend:9} {got!s:8} {row.gets}{verdict}")


def send_out(row: Row, family: int, inside: Side, outside: Side) -> tuple[int | str, int]:
    target = {"peer": PEER, "pod": POD, "loopback": LOOPBACK, "probe": PROBE}[row.target][family]
    with opened(inside.path, lambda: client(row, family)) as sock:
        if row.protocol == "tcp":
            try:
                sock.connect((target, row.port))
            except ConnectionRefusedError:
                return "refused", 0
            return taker(row, family, inside, outside)
        sock.sendto(b"?", (target, row.port))
        return taker(row, family, inside, outside)


def taker(row: Row, family: int, inside: Side, outside: Side) -> tuple[int | str, int]:
    """Which listener got the connection or datagram, and its original destination's port."""
    by_fd = {sock.fileno(): key for side in (inside, outside) for key, sock in side.sockets.items()}
    ready, _, _ = select.select(list(by_fd), [], [], WAIT)
    assert len(ready) <= 1, f"{row}: more than one listener got it"
    if not ready:
        return "nobody", 0
    protocol, port = by_fd[ready[0]]
    sock = next(s for side in (inside, outside) for s in side.sockets.values() if s.fileno() == ready[0])
    if protocol == "udp":
        sock.recv(100)
        return port, 0
    connection, _ = sock.accept()
    with connection:
        return port, original_port(connection, family)


def original_port(connection: socket.socket, family: int) -> int:
    level, size = (socket.SOL_IP, 16) if family == 4 else (41, 28)
    with contextlib.suppress(OSError):
        return int(struct.unpack(">H", connection.getsockopt(level, 80, size)[2:4])[0])
    return 0


def send_in(row: Row, family: int, inside: Side, outside: Side) -> tuple[int | str, int]:
    """A crafted SYN, its SYN-ACK answered by hand; or a crafted datagram."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import IPv6

    source = (PROBE if row.source == "probe" else PEER)[family]
    base = (IP if family == 4 else IPv6)(src=source, dst=POD[family])
    port = 20000 + (os.urandom(1)[0] << 6) + (ROWS.index(row) << 1)
    if row.protocol == "udp":
        transmit(outside.path, family, base / UDP(sport=port, dport=row.port) / b"?")
        return taker(row, family, inside, outside)
    with no_kernel_reset(outside.path, port), sniffer(outside.path) as sniffed:
        transmit(outside.path, family, base / TCP(sport=port, dport=row.port, flags="S", seq=1000))
        answer = awaited(sniffed, family, port)
        if "R" in str(answer[TCP].flags):
            return "refused", 0
        assert answer[TCP].sport == row.port, "the answer comes from where the SYN went"
        third = TCP(sport=port, dport=row.port, flags="A", seq=1001, ack=answer[TCP].seq + 1)
        transmit(outside.path, family, base / third)
        return taker(row, family, inside, outside)


def transmit(path: Path, family: int, packet) -> None:  # type: ignore[no-untyped-def]
    kind = socket.AF_INET if family == 4 else socket.AF_INET6

    def raw() -> socket.socket:
        sock = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        return sock

    with opened(path, raw) as sock:
        sock.sendto(bytes(packet), (packet.dst, 0))


@contextlib.contextmanager
def sniffer(path: Path) -> Iterator[socket.socket]:
    sock = opened(path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
    with sock:
        sock.settimeout(WAIT)
        yield sock


@contextlib.contextmanager
def no_kernel_reset(path: Path, port: int) -> Iterator[None]:
    """The peer's kernel knows nothing of our handshake: its RST must not end it."""
    rule = f"tcp sport {port} tcp flags & rst == rst drop"
    chain = f"chain out {{\n type filter hook output priority 0;\n {rule}\n}}"
    run(["nft", "-f", "-"], netns=path, stdin=f"table inet quiet {{\n{chain}\n}}\n")
    try:
        yield
    finally:
        run(["nft", "delete", "table", "inet", "quiet"], netns=path)


def awaited(sniffed: socket.socket, family: int, port: int):  # type: ignore[no-untyped-def]
    from scapy.layers.inet import TCP
    from scapy.layers.l2 import Ether

    while True:
        frame = Ether(sniffed.recv(65536))
        if TCP in frame and frame[TCP].dport == port:
            return frame


@pytest.mark.parametrize("choice", CHOICES)
def test_without_a_proxy_a_connection_is_refused_not_passed(choice: str) -> None:
    row = Row("", "out", "tcp", "peer", APP, "refused")
    with joined() as (pod, peer):
        settle(pod.target, Redirect(), layers(choice))
        outside = Side(peer.path)
        try:
            for family in (4, 6):
                with opened(pod.path, partial(client, row, family)) as sock, pytest.raises(ConnectionRefusedError):
                    sock.connect((PEER[family], APP))
            assert select.select(list(outside.sockets.values()), [], [], 0)[0] == []
        finally:
            outside.close()


def test_a_clients_address_is_kept_towards_the_application(sides: tuple[str, Side, Side]) -> None:
    """ztunnel speaks to the application as the client: its answers come back by mark 0x111 and table 100."""
    _, inside, _ = sides
    for family in (4, 6):
        kind = socket.AF_INET if family == 4 else socket.AF_INET6

        def transparent(kind: int = kind, family: int = family) -> socket.socket:
            sock = socket.socket(kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
            sock.setsockopt(*((socket.SOL_IP, 19, 1) if family == 4 else (41, 75, 1)))
            sock.bind((PEER[family], 0))
            sock.settimeout(WAIT)
            return sock

        with opened(inside.path, transparent) as proxy:
            proxy.connect((POD[family], APP))
            application, client_address = inside.sockets["tcp", APP].accept()
            with application:
                assert client_address[0].removeprefix("::ffff:") == PEER[family]
                application.sendall(b"answer")
                assert proxy.recv(100) == b"answer"
