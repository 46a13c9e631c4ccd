# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel against real packets: a pod with its rules, a peer, and an agent that speaks ZDS."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaking import marking
from support.node import until
from support.ztunnel import (
    PEER4,
    PEER6,
    POD4,
    POD6,
    RESOLVER4,
    RESOLVER6,
    SECONDS,
    Lab,
    Place,
    abort,
    labs,
    read_all,
)

from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.zds.messages import Add, Delete, Keep, SnapshotSent
from agent.ztunnel.dns import dnsmessage

pytestmark = pytest.mark.root
STREAM = 64 << 20


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with labs(tmp_path) as made:
        yield made


@pytest.fixture
def served(lab: Lab) -> Lab:
    lab.serve()
    return lab


def block() -> bytes:
    return os.urandom(1 << 20)


def read(end: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = end.recv(size - len(parts))
        assert part
        parts += part
    return bytes(parts)


def keepalive_of_ztunnel(diag: SockDiag, remote: tuple[str, int]) -> float:
    """In how many seconds ztunnel's socket in the pod probes this peer; 0 without one."""
    for one in diag.both():
        if one.remote == remote and one.of_ztunnel:
            return diag.keepalive(one.local, one.remote) or 0
    return 0


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
    served.pod.ip("addr", "add", f"{second}/{64 if six else 24}", "dev", "eth0", *(["nodad"] if six else []))
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


@pytest.mark.parametrize(("resolver", "family"), [(RESOLVER4, socket.AF_INET), (RESOLVER6, socket.AF_INET6)])
def test_a_query_of_its_own_that_comes_back_fails_at_once(served: Lab, resolver: str, family: int) -> None:
    """Else one query makes thousands."""
    with (
        served.peer.listen(resolver, 53, socket.SOCK_DGRAM),
        served.pod.make(family, socket.SOCK_DGRAM) as client,
        marking(served.pod.path, "meta l4proto udp", 0x40000),
    ):
        client.sendto(question(0x1234), (resolver, 53))
        assert client.recv(2000) == dnsmessage.failure(question(0x1234))
    record = served.ztunnel.wait_record(close="refused")
    assert "overwrites its mark" in record["error"] and served.ztunnel.records() == [record]


def test_pod_to_itself(served: Lab) -> None:
    with served.pod.listen(POD4, 8080) as listener, served.pod.connect(POD4, 8080) as client:
        application, _ = listener.accept()
        with application:
            client.sendall(b"me")
            assert application.recv(2) == b"me"
            assert application.getpeername() == client.getsockname()


@pytest.mark.parametrize(("resolver", "family"), [(RESOLVER4, socket.AF_INET), (RESOLVER6, socket.AF_INET6)])
@pytest.mark.parametrize("connected", [True, False])
def test_dns_over_udp_is_unchanged(served: Lab, resolver: str, family: int, connected: bool) -> None:
    query, answer = question(0x1234), b"\x12\x34\x84\0" + os.urandom(1100)
    with (
        served.peer.listen(resolver, 53, socket.SOCK_DGRAM) as server,
        served.pod.make(family, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(SECONDS)
        for _ in range(3):
            if connected:
                client.connect((resolver, 53))
                client.send(query)
            else:
                client.sendto(query, (resolver, 53))
            got, source = server.recvfrom(2000)
            assert got == query
            assert source[1] != client.getsockname()[1]  # it did go through ztunnel
            for one in (b"\xff\xff another's", answer, answer):  # what does not belong to it is the client's to judge
                server.sendto(one, source)
                received, resolver_seen = client.recvfrom(2000)
                assert received == one
                assert resolver_seen[:2] == (resolver, 53)
    record = served.ztunnel.wait_record(kind="dns", close="fin")
    assert (record["sent"], record["received"]) == (len(query), len(answer))
    assert record["destination"] == (f"[{resolver}]:53" if ":" in resolver else f"{resolver}:53")


def test_what_is_not_dns_is_one_flow(served: Lab) -> None:
    """A tunnel on port 53: the server sees one client, and may send when it likes."""
    with (
        served.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as server,
        served.pod.make(kind=socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(SECONDS)
        client.connect((RESOLVER4, 53))
        seen = set()
        for number in range(3):
            client.send(b"\1\0\0\0 hello" + bytes((number,)))
            data, source = server.recvfrom(100)
            seen.add(source)
            for word in (b"one", b"two"):
                server.sendto(word + data, source)
                assert client.recv(100) == word + data
        assert len(seen) == 1
        assert served.agent.ask(Delete("uid-1")) == ""
        record = served.ztunnel.wait_record(kind="udp")
        assert (record["sent"], record["received"]) == (33, 6 * 14)


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_a_resolver_that_is_not_there_is_said_at_once(served: Lab, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with served.pod.make(family, socket.SOCK_DGRAM) as client:
        client.connect((host, 53))
        client.send(question(7))
        assert client.recv(100) == b"\0\x07\x81\x82\0\1\0\0\0\0\0\0" + question(7)[12:], "SERVFAIL"
    assert served.ztunnel.wait_record(kind="dns", close="refused")["error"] == "Connection refused"


def test_dns_without_an_answer(lab: Lab) -> None:
    lab.serve(settings="dns_seconds=0.2")
    silent = lab.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM)
    lab.close_later(silent)
    with lab.pod.make(kind=socket.SOCK_DGRAM) as client:
        client.sendto(question(1), (RESOLVER4, 53))
        assert lab.ztunnel.wait_record(kind="dns", close="timeout")["destination"] == f"{RESOLVER4}:53"
        client.sendto(question(2), (PEER4, 53))  # nobody there
        assert lab.ztunnel.wait_record(kind="dns", close="refused")["destination"] == f"{PEER4}:53"
        client.sendto(question(3), ("127.0.0.1", 15053))  # was never redirected
        assert "conntrack" in lab.ztunnel.wait_record(kind="dns", close="error")["error"]


@pytest.mark.parametrize("resolver", [RESOLVER4, RESOLVER6])
def test_dns_over_tcp_is_unchanged(served: Lab, resolver: str) -> None:
    client, server = served.outbound(resolver, 53)
    client.sendall(b"\0\4quiz")
    assert server.recv(10) == b"\0\4quiz"
    server.sendall(b"\0\2ok")
    assert client.recv(10) == b"\0\2ok"
    assert client.getpeername()[:2] == (resolver, 53)


def test_add_again_keep_and_delete(served: Lab) -> None:
    client, server = served.outbound()
    assert served.agent.add(served.pod) == ""  # the same pod in the same namespace: nothing happens
    client.sendall(b"still here")
    assert server.recv(20) == b"still here"
    assert served.agent.ask(Delete("never heard of")) == ""
    assert served.agent.ask(Delete("uid-1")) == ""
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_listening(served.pod, False)
    assert served.ztunnel.wait_record(close="drained")["sent"] == 10
    assert served.agent.add(served.pod) == ""
    served.outbound()


def test_another_namespace_under_the_same_uid(served: Lab) -> None:
    assert served.agent.add(served.peer) == ""
    wait_listening(served.peer, True)
    wait_listening(served.pod, False)


def test_snapshot_drops_what_is_not_named(served: Lab) -> None:
    assert served.agent.add(served.peer, "uid-2") == ""
    client, server = served.outbound(port=15008)
    served.agent.link.close()
    served.agent.accept()
    assert served.agent.ask(Keep("uid-1")) == ""
    wait_listening(served.peer, True)  # not yet: the snapshot is not complete
    assert served.agent.ask(SnapshotSent()) == ""
    wait_listening(served.peer, False)
    client.sendall(b"kept")
    assert server.recv(10) == b"kept"
    assert "after SnapshotSent" in served.agent.ask(Keep("uid-1"))


def test_failed_start_is_refused_and_tried_again(lab: Lab) -> None:
    lab.start()
    lab.agent.accept()
    squatter = lab.pod.listen("0.0.0.0", 15006)
    assert "in use" in lab.agent.add(lab.pod)
    assert lab.agent.ask(SnapshotSent()) == ""
    wait_listening(lab.pod, False)
    squatter.close()
    wait_listening(lab.pod, True)
    lab.outbound()


def test_agent_dies_and_comes_back(served: Lab) -> None:
    client, server = served.outbound()
    served.agent.close()
    served.outbound(port=8081)  # new connections meanwhile
    served.agent = type(served.agent)(served.agent.path)
    served.agent.accept_with(served.pod)
    client.sendall(b"same connection")
    assert server.recv(20) == b"same connection"


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x7fshort", b"x" * 1500, b"\x22\x00"])
def test_garbage_from_the_agent(served: Lab, garbage: bytes) -> None:
    client, server = served.outbound()
    with pytest.raises(AssertionError):  # an error is acknowledged, then the connection is dropped
        assert served.agent.ask_raw(garbage) == ""
    served.agent.accept_with(served.pod)
    client.sendall(b"same connection")
    assert server.recv(20) == b"same connection"


def test_descriptors_where_none_or_one_belongs(served: Lab) -> None:
    one = (served.pod.netns.fd,)
    before = served.ztunnel.fds()
    add = Add("uid-9", "web", "shop", "default")
    for request, fds in ((add, ()), (add, one * 2), (Delete("uid-9"), one)):
        assert "descriptors" in served.agent.ask(request, fds)
        served.agent.accept_with(served.pod)
    with Path("/dev/null").open() as other:
        assert "not a namespace" in served.agent.ask(add, (other.fileno(),))
    assert served.agent.add(served.pod) == ""
    assert served.ztunnel.fds() == before


def test_ipv6_switched_off(lab: Lab) -> None:
    lab.pod.call(lambda: Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1"))
    lab.serve()
    client, server = lab.outbound()
    client.sendall(b"v4")
    assert server.recv(2) == b"v4"
    lab.outbound(RESOLVER4, 53)


def test_records_that_cannot_be_written_stop_nothing(lab: Lab) -> None:
    (lab.folder / "full").symlink_to("/dev/full")
    lab.serve("full")
    for _ in range(3):
        client, server = lab.outbound()
        client.close()
        assert read_all(server) == b""
        server.close()


class Echo:
    """Answers every connection to it until closed, and clients that never pause."""

    def __init__(self, lab: Lab, inbound: bool) -> None:
        server, client, host = (lab.pod, lab.peer, POD4) if inbound else (lab.peer, lab.pod, PEER4)
        self.client, self.host = client, host
        self.listener = server.listen(host, 8080)
        self.failures: list[str] = []
        self.done = itertools.count()
        self.made = 0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=what) for what in (self.serve, self.ask, self.ask)]
        for thread in self.threads:
            thread.start()

    def serve(self) -> None:
        while True:  # until the listener is shut: after the clients, which must all get their answer
            try:
                end, _ = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with end:
                end.sendall(end.recv(100))

    def ask(self) -> None:
        while not self.stop.is_set():
            try:
                with self.client.connect(self.host, 8080) as end:
                    end.sendall(b"hello")
                    if read_all(end) != b"hello":
                        self.failures.append("cut short")
            except OSError as error:
                self.failures.append(repr(error))
            self.made = next(self.done)

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


@pytest.mark.parametrize("inbound", [False, True])
def test_rolling_restart_fails_no_connection(served: Lab, inbound: bool) -> None:
    traffic = Echo(served, inbound)
    try:
        long_lived, server = served.outbound(port=8081)
        old, old_link = served.ztunnel, served.agent.link
        for round_ in range(3):
            traffic.wait_more(50)
            new = served.serve(f"records-{round_}")
            old.terminate()
            if round_ == 0:
                wait_new = new.wait_record(close="fin")
                assert wait_new["uid"] == "uid-1"
                long_lived.sendall(b"through the old one")
                assert server.recv(30) == b"through the old one"
                long_lived.close()
                assert read_all(server) == b""
                server.close()
            assert old.process.wait(SECONDS) == 0
            old_link.close()
            old, old_link = new, served.agent.link
        traffic.wait_more(50)
    finally:
        traffic.close()
    assert traffic.failures == []


def test_restart_loses_nothing_that_waits_for_the_old_one(served: Lab) -> None:
    """The old instance stands still: what came before is its to accept, what comes after goes to the new one."""
    listener = served.peer.listen(PEER4, 8080)
    served.close_later(listener)

    def connect(number: int) -> list[socket.socket]:
        made = [served.pod.connect(PEER4, 8080) for _ in range(number)]
        served.close_later(*made)
        return made

    def all_reach_the_server(clients: list[socket.socket]) -> None:
        for client in clients:
            client.sendall(b"?")
        for _ in clients:
            server, _ = listener.accept()
            server.settimeout(SECONDS)
            with server:
                assert server.recv(1) == b"?"
        for client in clients:
            assert client.recv(1) == b""

    old = served.ztunnel.process
    os.kill(old.pid, signal.SIGSTOP)
    before = connect(300)
    served.serve("new")
    all_reach_the_server(connect(100))
    os.kill(old.pid, signal.SIGTERM)
    os.kill(old.pid, signal.SIGCONT)
    all_reach_the_server(before)
    for client in before:
        client.close()
    assert old.wait(SECONDS) == 0


def test_end_waits_for_connections_and_a_second_signal_does_not(lab: Lab) -> None:
    lab.serve(drain=3600)
    client, server = lab.outbound()
    lab.ztunnel.terminate()
    wait_listening(lab.pod, False)
    assert "about to end" in lab.agent.add(lab.pod, "uid-2")
    client.sendall(b"draining")
    assert server.recv(10) == b"draining"
    lab.ztunnel.terminate()
    assert lab.ztunnel.process.wait(SECONDS) == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert lab.ztunnel.records()[-1]["close"] == "drained"


def test_a_pod_beyond_its_share_is_refused_at_once_and_named(lab: Lab) -> None:
    lab.serve(settings="share=2")
    (one, server), _ = lab.outbound(), lab.inbound()
    # The reset may come before connect() returns.
    with lab.peer.listen(PEER4, 8081), pytest.raises(ConnectionResetError), lab.pod.connect(PEER4, 8081) as third:
        third.recv(1)
    record = lab.ztunnel.wait_record(close="refused")
    assert record["pod"] == "shop/web" and "its limit of 2 connections" in record["error"]
    one.close()
    server.close()
    lab.ztunnel.wait_record(close="fin")
    lab.outbound()
