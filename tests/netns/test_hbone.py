# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods go through HBONE: two real ztunnels, real packets."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.hbone import Node, joined, two_nodes
from support.istio_peer import PAIRS, SAME, any_pair
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS, abort, read_all

from agent.kernel.exec import run

pytestmark = pytest.mark.root

MARKER = b"the payload of this test must not be on the wire"
ETH_P_ALL = 3
CUT = "table inet cut { chain cut { type filter hook prerouting priority -400; iifname != lo drop; }; }"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """For tests that read records, or replace a ztunnel."""
    with two_nodes(tmp_path) as both:
        for node in both:
            node.start()
        yield both


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nodes(pair: str, tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with any_pair(pair, tmp_path) as both:
        yield both


@pytest.mark.parametrize(("host", "source"), [(PEER4, POD4), (PEER6, POD6)])
def test_bytes_pass_both_ways_from_the_clients_address(own: tuple[Node, Node], host: str, source: str) -> None:
    web, shop = own
    with joined(*own, host) as (client, server):
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"
        assert server.getpeername()[0] == source
    sent = web.ztunnel.wait_record(kind="hbone", direction="outbound")
    taken = shop.ztunnel.wait_record(kind="hbone", direction="inbound")
    assert sent["via"].endswith(":15008")
    for record in (sent, taken):
        assert (record["sent"], record["received"], record["close"], record["error"]) == (8, 6, "fin", "")


def test_no_byte_of_the_payload_is_on_the_wire(nodes: tuple[Node, Node]) -> None:
    web, _ = nodes
    packets = web.pod.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    packets.bind(("eth0", ETH_P_ALL))
    with packets, joined(*nodes) as (client, server):
        for end, other in ((client, server), (server, client)):
            end.sendall(MARKER * 100)
            assert _read(other, len(MARKER) * 100) == MARKER * 100
        packets.setblocking(False)
        captured = []
        with contextlib.suppress(BlockingIOError):
            while True:
                captured.append(packets.recv(1 << 16))
    hbone = [packet for packet in captured if _tcp_ports(packet) & {15008}]
    assert sum(map(len, hbone)) > 2 * 100 * len(MARKER)
    assert not [packet for packet in captured if 8080 in _tcp_ports(packet)]
    assert not [packet for packet in captured if MARKER[:12] in packet]


def _tcp_ports(packet: bytes) -> set[int]:
    if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
        return set()
    return set(struct.unpack_from(">HH", packet, 14 + (packet[14] & 15) * 4))


def test_each_side_may_end_first(nodes: tuple[Node, Node]) -> None:
    with joined(*nodes) as (client, server):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"question"
        server.sendall(b"a late answer")
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"a late answer"
    with joined(*nodes) as (client, server):
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        client.sendall(b"still open")
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"still open"


def test_a_reset_passes_both_ways(nodes: tuple[Node, Node], pair: str) -> None:
    with joined(*nodes) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        abort(client)
        with contextlib.suppress(ConnectionResetError):
            assert server.recv(1) == b""
            assert pair != SAME  # Istio's makes of a reset the end of a complete transfer
    with joined(*nodes) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        abort(server)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
            assert pair != SAME  # Istio's makes of a reset the end of a complete transfer
    with joined(*nodes) as (client, server):  # the session goes on
        client.sendall(b"y")
        assert server.recv(1) == b"y"


def test_a_hundred_megabytes_pass_both_ways_at_once(nodes: tuple[Node, Node]) -> None:
    block = random.Random(1).randbytes(1 << 20)
    with joined(*nodes) as (client, server), ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(_send_blocks, end, block, 100) for end in (client, server)]
        taken = [pool.submit(_count_blocks, end, block) for end in (client, server)]
        assert [one.result(SECONDS * 3) for one in sending] == [None, None]
        assert [one.result(SECONDS * 3) for one in taken] == [100, 100]


def _send_blocks(end: socket.socket, block: bytes, count: int) -> None:
    for _ in range(count):
        end.sendall(block)
    end.shutdown(socket.SHUT_WR)


def _count_blocks(end: socket.socket, block: bytes) -> int:
    """Counts the blocks up to the FIN; each must be the same."""
    count = 0
    while got := _read(end, len(block)):
        assert got == block
        count += 1
    return count


def _read(end: socket.socket, size: int) -> bytes:
    """Reads `size` bytes, less only before the FIN."""
    parts = bytearray()
    while len(parts) < size and (part := end.recv(size - len(parts))):
        parts += part
    return bytes(parts)


def test_two_hundred_connections_at_once(nodes: tuple[Node, Node]) -> None:
    web, shop = nodes
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(shop.pod.listen(PEER4, 8080))
        clients = [opened.enter_context(web.pod.connect(PEER4, 8080)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(b"%03d" % number)
        servers = {}
        for _ in clients:
            server, _ = listener.accept()
            server.settimeout(SECONDS)
            servers[_read(server, 3)] = opened.enter_context(server)
        assert sorted(servers) == [b"%03d" % number for number in range(200)]
        for name, server in servers.items():
            server.sendall(name * 1000)
        for number, client in enumerate(clients):
            assert _read(client, 3000) == b"%03d" % number * 1000


def test_a_stalled_application_stops_its_sender_and_nobody_else(nodes: tuple[Node, Node]) -> None:
    block = bytes(1 << 20)
    with joined(*nodes, port=8080) as (client, server), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(_send_blocks, client, block, 64)
        with joined(*nodes, port=8081, served=8081) as (other, end):
            for _ in range(100):
                other.sendall(b"ping")
                assert _read(end, 4) == b"ping"
        assert not sending.done()
        assert web_memory(nodes) < 200 << 20
        assert _count_blocks(server, block) == 64
        assert sending.result(SECONDS) is None


def web_memory(nodes: tuple[Node, Node]) -> int:
    return max(node.ztunnel.memory() for node in nodes if hasattr(node, "ztunnel"))


def test_an_application_that_does_not_listen_is_a_reset(own: tuple[Node, Node]) -> None:
    web, shop = own
    with pytest.raises(ConnectionResetError), web.pod.connect(PEER4, 8089) as client:  # perhaps before it returns
        client.recv(1)
    assert web.ztunnel.wait_record(direction="outbound")["error"] == "http status: 503"
    assert shop.ztunnel.wait_record(direction="inbound")["close"] == "refused"
    with joined(*own) as (client, server):  # the session goes on
        client.sendall(b"y")
        assert server.recv(1) == b"y"


def test_both_applications_hear_that_the_other_node_is_gone(tmp_path: Path) -> None:
    """No RST and no FIN comes: only the pings of both ztunnels notice."""
    quick = "from agent.ztunnel.hbone import limits\nlimits.PING_SECONDS, limits.PING_TIMEOUT_SECONDS = 0.5, 1.0"
    with two_nodes(tmp_path) as (web, shop):
        for node in (web, shop):
            node.start(first=quick)
        with joined(web, shop) as (client, server):
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            for node in (web, shop):
                run(["nft", "-f", "-"], stdin=CUT, netns=node.pod.path)
            for end in (client, server):
                end.settimeout(SECONDS)
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
        for node, direction in ((web, "outbound"), (shop, "inbound")):
            record = node.ztunnel.wait_record(kind="hbone", direction=direction)
            assert (record["close"], record["error"]) == ("error", "HBONE ping timeout")


def test_new_streams_find_the_next_instance_when_one_drains(own: tuple[Node, Node], tmp_path: Path) -> None:
    """The old instance says GOAWAY: its streams run on, and no new connection fails."""
    _web, shop = own
    with joined(*own) as (client, server):
        client.sendall(b"old")
        assert server.recv(3) == b"old"
        old = shop.ztunnel
        shop.start("second")
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(_ask_until, own, stop)
            old.terminate()
            shop.ztunnel.wait_record(direction="inbound")  # new streams come to the new instance
            client.sendall(b"still")
            assert _read(server, 5) == b"still"
            stop.set()
            assert asking.result(SECONDS) > 0
    old.process.wait(SECONDS)


def _ask_until(nodes: tuple[Node, Node], stop: threading.Event) -> int:
    """Opens one connection after the other; each must carry a question and an answer."""
    count = 0
    while not stop.is_set():
        with joined(*nodes, port=8085, served=8085) as (client, server):
            client.sendall(b"q")
            assert server.recv(1) == b"q"
            server.sendall(b"a")
            assert client.recv(1) == b"a"
        count += 1
    return count
