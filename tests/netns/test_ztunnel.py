# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel against real packets: a pod with its rules, a peer, and an agent that speaks ZDS."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import socket
import threading
import time
from pathlib import Path

import pytest
from support.leaking import marking
from support.node import until
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS, Lab, abort, question, read, read_all

from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.lab.links import links

pytestmark = pytest.mark.root
STREAM = 64 << 20


def block() -> bytes:
    return os.urandom(1 << 20)


def keepalive_of_ztunnel(diag: SockDiag, remote: tuple[str, int]) -> float:
    """In how many seconds ztunnel's socket in the pod probes this peer; 0 without one."""
    for one in diag.both():
        if one.remote == remote and one.of_ztunnel:
            return diag.keepalive(one.local, one.remote) or 0
    return 0


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_outbound_reaches_the_original_destination(served: Lab, host: str) -> None:
    client, server = served.outbound(host)
    client.sendall(b"ping")
    assert server.recv(10) == b"ping"
    assert client.getpeername()[:2] == (host, 8080)
    server.sendall(b"pong!")
    server.close()
    assert read_all(client) == b"pong!"
    client.close()
    record = served.ztunnel.wait_record(direction="outbound", close="fin")
    assert record["destination"] == (f"[{host}]:8080" if ":" in host else f"{host}:8080")
    assert (record["sent"], record["received"], record["pod"], record["uid"]) == (4, 5, "shop/web", "uid-1")


@pytest.mark.parametrize(("host", "second"), [(PEER4, "10.77.0.3"), (PEER6, "fd77::3")])
def test_outbound_keeps_an_address_that_the_application_has_bound(served: Lab, host: str, second: str) -> None:
    six = ":" in host
    with links(served.pod.name) as inside:
        inside.add_addresses("eth0", f"{second}/{64 if six else 24}")
    family = socket.AF_INET6 if six else socket.AF_INET
    with served.peer.listen(host, 8080) as listener, served.pod.make(family) as client:
        client.bind((second, 0))
        client.connect((host, 8080))
        server, seen = listener.accept()
        server.close()
        assert seen[0] == second and seen[1] != client.getsockname()[1]
    with (
        served.peer.listen(host, 53, socket.SOCK_DGRAM) as resolver,
        served.pod.make(family, socket.SOCK_DGRAM) as client,
    ):
        client.bind((second, 0))
        client.sendto(question(1), (host, 53))
        assert resolver.recvfrom(100)[1][0] == second


def test_a_reserved_source_port_becomes_another_reserved_one(served: Lab) -> None:
    with served.peer.listen(PEER4, 8080) as listener, served.pod.make() as client:
        client.bind(("0.0.0.0", 717))
        client.connect((PEER4, 8080))
        server, seen = listener.accept()
        server.close()
        assert seen[0] == POD4 and seen[1] < 1024


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_the_ephemeral_ports_are_left_to_the_application(served: Lab, host: str) -> None:
    """80 connections to one server with 100 ports: rules let the application and ztunnel share them."""
    served.pod.call(lambda: Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40099"))
    with served.peer.listen(host, 8080) as listener:
        for number in range(80):
            client = served.pod.connect(host, 8080)
            served.close_later(client)
            client.sendall(bytes((number,)))
            server, _ = listener.accept()
            served.close_later(server)
            server.settimeout(SECONDS)
            assert server.recv(1) == bytes((number,))


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_the_far_end_is_probed_without_the_application(served: Lab, direction: str) -> None:
    client, server = getattr(served, direction)()
    far = server if direction == "outbound" else client
    with contextlib.closing(served.pod.call(SockDiag)) as diag:
        assert 170 < keepalive_of_ztunnel(diag, far.getsockname()[:2]) <= 180


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_the_far_end_is_probed_as_the_application_probes(served: Lab, direction: str) -> None:
    client, server = getattr(served, direction)()
    application, far = (client, server) if direction == "outbound" else (server, client)
    application.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 50)
    application.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.closing(served.pod.call(SockDiag)) as diag:
        until = time.monotonic() + SECONDS
        while not 0 < (left := keepalive_of_ztunnel(diag, far.getsockname()[:2])) <= 60:
            assert time.monotonic() < until, left
            time.sleep(0.05)


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
@pytest.mark.parametrize("before", [3, 1 << 20], ids=["message", "stream"])
def test_urgent_data_keeps_its_place(served: Lab, direction: str, before: int) -> None:
    client, server = getattr(served, direction)()
    data = os.urandom(before)
    for _ in range(2):
        client.sendall(data)
        assert read(server, before) == data
        client.send(b"!", socket.MSG_OOB)
        client.sendall(data)
        assert read(server, before + 1) == b"!" + data
    client.close()
    assert server.recv(1) == b""


@pytest.mark.parametrize("host", [POD4, POD6])
def test_inbound_keeps_the_source_address(served: Lab, host: str) -> None:
    client, application = served.inbound(host)
    assert application.getpeername()[0] == client.getsockname()[0]
    assert application.getpeername()[1] != client.getsockname()[1]  # it did go through ztunnel
    assert application.getsockname()[:2] == (host, 8080)
    client.sendall(b"ping")
    assert application.recv(10) == b"ping"
    application.close()
    assert read_all(client) == b""
    client.close()
    assert served.ztunnel.wait_record(direction="inbound", close="fin")["error"] == ""


def test_many_clients_on_the_same_few_ports(served: Lab) -> None:
    """A client's next port must not be one that ztunnel took in its name: conntrack would join the two."""
    for place in (served.pod, served.peer):
        place.call(lambda: Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40031"))
    listener = served.pod.listen(POD4, 8080)
    served.close_later(listener)
    ends = []
    for number in range(12):
        client = served.peer.connect(POD4, 8080)
        served.close_later(client)
        client.sendall(bytes((number,)))
        application, _ = listener.accept()
        application.settimeout(SECONDS)
        served.close_later(application)
        ends.append((client, application))
        assert application.recv(1) == bytes((number,))
    for client, application in ends:
        application.sendall(b"ok")
        assert client.recv(2) == b"ok"


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_half_close_of_each_side(served: Lab, direction: str) -> None:
    for first in (0, 1):
        ends = getattr(served, direction)()
        ends[first].sendall(b"question")
        ends[first].shutdown(socket.SHUT_WR)
        assert read_all(ends[1 - first]) == b"question"
        ends[1 - first].sendall(b"answer")
        ends[1 - first].close()
        assert read_all(ends[first]) == b"answer"
        ends[first].close()


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
@pytest.mark.parametrize("state", ["idle", "half closed", "stalled"])
def test_reset_of_each_side(served: Lab, direction: str, state: str) -> None:
    for first in (0, 1):
        ends = getattr(served, direction)()
        one, other = ends[first], ends[1 - first]
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        if state == "half closed":
            one.shutdown(socket.SHUT_WR)
            assert other.recv(1) == b""
        if state == "stalled":
            fill(one)
        abort(one)
        reset = select.poll()
        reset.register(other, 0)
        assert reset.poll(SECONDS * 1000), "no reset arrived"
        assert other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE)
        other.close()
    assert served.ztunnel.wait_record(close="reset")


def fill(end: socket.socket) -> int:
    """Sends until nothing more is taken for a while; the number of bytes."""
    sent = 0
    room = select.poll()
    room.register(end, select.POLLOUT)
    end.setblocking(False)
    while room.poll(300):
        sent += end.send(b"s" * (1 << 16))
    end.settimeout(SECONDS)
    return sent


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_large_transfer_both_ways_at_once(served: Lab, direction: str) -> None:
    client, server = getattr(served, direction)()
    sums = {}

    def send(end: socket.socket, name: str) -> None:
        made, part = hashlib.sha256(), block()
        for _ in range(STREAM // len(part)):
            end.sendall(part)
            made.update(part)
        end.shutdown(socket.SHUT_WR)
        sums[name] = made.hexdigest()

    def receive(end: socket.socket, name: str) -> None:
        made = hashlib.sha256()
        while part := end.recv(1 << 18):
            made.update(part)
        sums[name] = made.hexdigest()

    work = [
        (send, client, "up"), (receive, server, "up got"),
        (send, server, "down"), (receive, client, "down got"),
    ]  # fmt: skip
    threads = [threading.Thread(target=what, args=(end, name)) for what, end, name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sums["up"] == sums["up got"] and sums["down"] == sums["down got"]
    record = served.ztunnel.wait_record(close="fin")
    assert (record["sent"], record["received"]) == (STREAM, STREAM)


def test_slow_reader_loses_nothing_and_costs_no_memory(served: Lab) -> None:
    client, server = served.outbound()
    sent = threading.Thread(target=lambda: (client.sendall(b"z" * STREAM), client.shutdown(socket.SHUT_WR)))
    before = served.ztunnel.memory()
    sent.start()
    waiting = select.poll()
    waiting.register(client, select.POLLOUT)
    while waiting.poll(300):  # until all buffers on the way are full
        time.sleep(0.01)
    assert served.ztunnel.memory() - before < 8 << 20
    assert sent.is_alive()
    assert len(read_all(server)) == STREAM
    sent.join(SECONDS)


def test_refused_upstream_is_a_reset(served: Lab) -> None:
    with pytest.raises(ConnectionResetError), served.pod.connect(PEER4, 9) as client:  # it may come in connect()
        client.recv(1)
    assert served.ztunnel.wait_record(close="refused")["destination"] == f"{PEER4}:9"


def test_inbound_to_a_closed_port_is_a_reset(served: Lab) -> None:
    with pytest.raises(ConnectionResetError), served.peer.connect(POD4, 9) as client:
        client.recv(1)
    assert served.ztunnel.wait_record(close="refused")["direction"] == "inbound"


def test_connect_that_nobody_answers_is_a_reset(lab: Lab) -> None:
    lab.serve(settings="connect_seconds=0.2")
    with pytest.raises(ConnectionResetError), lab.pod.connect("10.77.0.99", 8080) as client:
        client.recv(1)
    assert lab.ztunnel.wait_record(close="timeout")["destination"] == "10.77.0.99:8080"


@pytest.mark.parametrize("port", [15001, 15006])
def test_own_ports_are_refused(served: Lab, port: int) -> None:
    for place in (served.peer, served.pod):
        with pytest.raises(ConnectionResetError), place.connect(POD4, port) as client:  # as early as in connect()
            client.recv(1)
    served.ztunnel.wait_record(close="refused", direction="inbound")
    with pytest.raises(ConnectionResetError), served.pod.connect("127.0.0.1", 15001) as client:
        client.recv(1)
    served.ztunnel.wait_record(close="refused", direction="outbound", destination="127.0.0.1:15001")


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_a_connection_of_its_own_that_comes_back_is_reset_at_once(served: Lab, host: str) -> None:
    """As where a rule of the pod marks all its packets (VPN, QoS): ztunnel's mark is gone."""
    chain = "chain out {\ntype route hook output priority -160\nmeta l4proto tcp meta mark set 0x40000\n}"
    served.pod.call(lambda: run(["nft", "-f", "-"], stdin=f"table inet own {{\n{chain}\n}}\n"))
    with served.peer.listen(host, 8080), pytest.raises(ConnectionResetError):  # as early as in connect()
        served.pod.connect(host, 8080).recv(1)
    text = f"[{host}]:8080" if ":" in host else f"{host}:8080"
    until(lambda: len(served.ztunnel.records()) == 3, "the application's connection, and two that came back")
    records = served.ztunnel.records()
    assert {one["destination"] for one in records} == {text}
    records.sort(key=lambda one: str(one["close"]))  # two workers write them
    assert [one["close"] for one in records] == ["refused", "reset", "reset"]
    assert "overwrites its mark" in records[0]["error"]
    served.pod.call(lambda: run(["nft", "delete table inet own"]))
    served.outbound(host, 8081)


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_a_connection_of_its_own_that_comes_back_once_is_relayed(served: Lab, host: str) -> None:
    """As where its port has met a stale entry of conntrack: the next port meets none."""
    first = "tcp dport 8080 meta mark 0x539 limit rate 1/day burst 1 packets"
    with marking(served.pod.path, first, 0x40000):
        client, server = served.outbound(host)
    with client, server:
        client.sendall(b"ping")
        assert read(server, 4) == b"ping"
        server.sendall(b"pong")
        assert read(client, 4) == b"pong"
    until(lambda: len(served.ztunnel.records()) == 2, "the records of both")
    text = f"[{host}]:8080" if ":" in host else f"{host}:8080"
    assert [(one["close"], one["destination"]) for one in served.ztunnel.records()] == [("fin", text)] * 2


def test_pod_to_itself(served: Lab) -> None:
    with served.pod.listen(POD4, 8080) as listener, served.pod.connect(POD4, 8080) as client:
        application, _ = listener.accept()
        with application:
            client.sendall(b"me")
            assert application.recv(2) == b"me"
            assert application.getpeername() == client.getsockname()
