# SPDX-License-Identifier: Apache-2.0
"""Leaks, made on purpose, are reported."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet
from support.accounting import MODES, accounted
from support.applications import Child, cookie, dial, fails, receive
from support.ebpf_pod import APP, FREE, KINDS, PEER, POD, SECONDS, Ztunnel, accepted, family, written
from support.fates import (
    EXCLUDED,
    IN,
    OUT,
    PORT,
    Served,
    fate,
    from_outside,
    inward,
    only,
    outward,
    served,
)
from support.leaking import MARKED, marking
from support.node import until

from agent.core.model.port_listeners import ZTUNNEL_PORTS
from agent.core.model.sockets import CAPTURE_PORTS
from agent.core.names import DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, ZTUNNEL_MARK
from agent.flows.record import Fate, Reason
from agent.kernel.bpf.map import Map

pytestmark = pytest.mark.root
RETURNS = 8  # bpf/returned.h


@pytest.fixture(params=MODES)
def account(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as made:
        yield made


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_without_rules_for_a_moment_everything_leaks(account: Served, kind: str) -> None:
    version = family(kind)
    account.settle(None)
    out = outward(account, account.app, kind, (PEER[version], APP))
    into = inward(account, lambda: from_outside(account, kind))
    assert [fate(one) for one in (out, into)] == [(way, Fate.LEAKED, Reason.NONE) for way in (OUT, IN)]
    free = outward(account, account.free, kind, (PEER[version], FREE))
    account.settle(account.want)
    then = outward(account, account.ztunnel.outbound, kind, (PEER[version], APP))
    assert (fate(free), fate(then)) == (EXCLUDED, (OUT, Fate.CAPTURED, Reason.NONE))
    only(account, *map(fate, (out, into, free, then)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_application_with_ztunnels_mark(account: Served, kind: str) -> None:
    """It is refused. Where the programs cannot tell who is ztunnel, it passes by rules, and by eBPF it does not."""
    where = PEER[family(kind)], APP
    account.application(lambda: fails(kind, where, errno.EPERM, options=(MARKED,))).result()
    only(account)
    account.collector._pods.doubt()
    by_mark = account.mode != "ebpf"
    to = account.app if by_mark else account.ztunnel.outbound
    one = outward(account, to, kind, (PEER[family(kind)], APP), mark=ZTUNNEL_MARK)
    assert fate(one) == (OUT, Fate.LEAKED if by_mark else Fate.CAPTURED, Reason.NONE)
    only(account, fate(one))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_to_ztunnel_is_refused_to_it(account: Served, kind: str) -> None:
    """A rule of the pod overwrites the mark of its packets, by which rules know ztunnel. eBPF knows its process."""
    back, codes = account.mode != "ebpf", Counter[int]()

    def connect() -> int:
        code = as_ztunnel(account, kind)
        codes[code] += 1
        return code

    with marking(account.pod.path, "meta l4proto tcp", 0x40000):
        if back:
            until(lambda: connect() == errno.EPERM, "several in one second")
            assert codes[0] >= RETURNS
            assert account.collector.returned(account.pod.cookie) == (PEER[family(kind)], APP)
        else:
            assert not any(connect() for _ in range(2 * RETURNS))
            assert account.collector.returned(account.pod.cookie) is None
        assert not as_ztunnel(account, kind, FREE), "other destinations are not refused"
        accepted(account.free).close()
    until(lambda: not as_ztunnel(account, kind), "the cause is gone")
    accepted(account.app).close()


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_one_that_comes_back_refuses_nothing(account: Served, kind: str) -> None:
    """It has met an entry of conntrack that outlived an application's connection; the next ones do not."""
    for _ in range(2):
        with marking(account.pod.path, "meta l4proto tcp", 0x40000):
            assert not as_ztunnel(account, kind)
        accepted(account.ztunnel.outbound if account.mode != "ebpf" else account.app).close()
        assert not as_ztunnel(account, kind)
        accepted(account.app).close()
    assert account.collector.returned(account.pod.cookie) is None


def as_ztunnel(account: Served, kind: str, port: int = APP) -> int:
    """Connects to the peer with ztunnel's mark; the errno."""
    with account.pod.make(kind) as made:
        made.setsockopt(*MARKED)
        return made.connect_ex((written(kind, PEER[family(kind)]), port))


def test_a_pod_that_calls_itself_is_reached_at_ztunnels_own_port() -> None:
    """Twice: Istio's ztunnel goes by HBONE also where both ends are in the same pod."""
    with served("nftables") as account, account.pod.listen(HBONE_PORT, mark=ZTUNNEL_MARK) as hbone:
        for _ in range(2):
            with account.pod.make() as made:
                made.setsockopt(*MARKED)
                made.connect((POD[4], HBONE_PORT))
                accepted(hbone).close()
        assert account.collector.returned(account.pod.cookie) is None


def test_what_has_ztunnels_mark_is_no_leak_until_a_ztunnel_was_met(account: Served) -> None:
    """As in a migration, when it still serves another agent: its own connections are in the pods, and nobody's here."""
    if account.mode == "ebpf":
        pytest.skip("eBPF captures nothing before it knows ztunnel's process")
    with Map.open(account.pins.maps / "ztunnels") as known:
        for key, _ in list(known.items()):
            known.delete(key)
    account.collector.programs.admit(())
    account.application(lambda: dial("IPv4", (PEER[4], APP), mark=ZTUNNEL_MARK).close()).result()
    accepted(account.app).close()
    until(lambda: account.sums(reason=Reason.ZTUNNEL)["opened"], "it counts as ztunnel's")
    only(account)
    account.collector.admit()
    account.collector._pods.doubt()
    one = outward(account, account.app, "IPv4", (PEER[4], APP), mark=ZTUNNEL_MARK)
    assert fate(one) == (OUT, Fate.LEAKED, Reason.NONE)


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_ztunnels_ports_are_for_ztunnel_alone(account: Served, host: str) -> None:
    """In a captured pod; elsewhere, and other ports and protocols, are anybody's."""

    def bind() -> list[tuple[int, int]]:
        refused = []
        ports = (*sorted(ZTUNNEL_PORTS), PORT + 1)
        for kind, port in itertools.product((socket.SOCK_STREAM, socket.SOCK_DGRAM), ports):
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as made:
                try:
                    made.bind((host, port))
                except PermissionError:
                    refused.append((int(kind), port))
                except OSError as error:
                    assert error.errno == errno.EADDRINUSE
        return refused

    tcp = [(int(socket.SOCK_STREAM), port) for port in sorted(CAPTURE_PORTS)]
    assert account.application(bind).result() == [*tcp, (int(socket.SOCK_DGRAM), DNS_PORT)]
    assert account.application(bind, where=account.peer).result() == []
    account.collector._pods.doubt()  # the programs cannot tell ztunnel from others
    assert account.application(bind).result() == []


@pytest.mark.parametrize("mode", ["nftables", "ebpf"])
def test_who_held_ztunnels_ports_before_captures_nothing(mode: str) -> None:
    """By rules it gets what they redirect, and that has leaked; by eBPF ztunnel gets it."""
    with accounted(mode, captured=False, ztunnel=False) as account:

        def steal(host: str, port: int) -> Child:
            ready, tell = os.pipe()

            def run() -> None:
                with socket.socket() as made:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    made.bind((host, port))
                    made.listen()
                    os.write(tell, b"x")
                    with made.accept()[0] as sock:
                        sock.sendall(b"thief")
                        receive(sock, 1)

            made = account.application(run, keep=(tell,))
            assert os.read(ready, 1)
            os.close(ready)
            os.close(tell)
            return made

        def ask() -> int:
            with socket.create_connection((PEER[4], APP), SECONDS) as sock:
                sock.sendall(b"x")
                assert receive(sock, 5) == 5
                return cookie(sock)

        thieves = [steal(*one) for one in (("127.0.0.1", OUTBOUND_PORT), (POD[4], INBOUND_PORT))]
        ztunnel = Ztunnel(account.pod, reuse=True)
        account.made.callback(ztunnel.close)
        account.capture()
        client = account.application(ask)
        if mode == "ebpf":
            with accepted(ztunnel.outbound) as sock:
                sock.sendall(b"right")
                assert fate(account.record(client.result())) == (OUT, Fate.CAPTURED, Reason.NONE)
            return
        assert fate(account.record(client.result())) == (OUT, Fate.LEAKED, Reason.NONE)
        with from_outside(account, "IPv4") as sock:
            sock.sendall(b"x")
            assert receive(sock, 5) == 5
        for one in thieves:
            one.result()
        until(lambda: (IN, Fate.LEAKED, Reason.NONE) in map(fate, account.read()), "the stolen connection")


def test_a_leak_that_lives_is_told_while_it_lives(account: Served) -> None:
    account.settle(None)
    wait, go = os.pipe()

    def app() -> None:
        with dial("IPv4", (PEER[4], APP)) as sock:
            sock.sendall(b"x")
            os.read(wait, 1)

    child = account.application(app, keep=(wait,))
    with accepted(account.app) as sock:
        assert sock.recv(1)
        until(lambda: account.sums(fate=Fate.LEAKED)["sent"], "it is counted")
        (one,) = account.collector.live()
        assert fate(one) == (OUT, Fate.LEAKED, Reason.NONE)
        os.write(go, b"x")
        child.result()
    assert account.records(1)[0].socket == one.socket
    only(account, (OUT, Fate.LEAKED, Reason.NONE))


def by_hand(packet: Packet, version: int) -> Callable[[], None]:
    """Sends it past all rules."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as raw:
            protocol = 0x0800 if version == 4 else 0x86DD
            for _ in range(3):
                with contextlib.suppress(OSError):  # ENOBUFS: the guard has dropped it
                    raw.sendto(bytes(packet), ("eth0", protocol, 0, 0, bytes(6)))

    return send


def ip(version: int, *, to: str = "") -> Packet:
    layer = IP if version == 4 else IPv6
    return layer(src=POD[version], dst=to or PEER[version])


@pytest.mark.parametrize("version", [4, 6])
def test_a_raw_socket_leaks_once_however_often_it_sends(account: Served, version: int) -> None:
    """By eBPF its packets are dropped, so nothing leaks."""
    for flags, port, to in (("S", 4001, APP), ("S", 4002, FREE), ("A", 4003, APP)):
        packet = ip(version) / TCP(sport=port, dport=to, flags=flags, seq=7)
        account.application(by_hand(packet, version)).result()
    account.application(by_hand(ip(version) / TCP(sport=4004, dport=APP, flags="SEC"), version)).result()
    if account.mode == "ebpf":
        only(account)
        return
    found = account.records(2)
    assert {(fate(one), one.remote) for one in found} == {((OUT, Fate.LEAKED, Reason.RAW), (PEER[version], APP))}
    assert [one.local for one in found] == [(POD[version], 4001), (POD[version], 4004)]
    only(account, *map(fate, found))


@pytest.mark.parametrize("version", [4, 6])
def test_an_answer_by_hand_is_a_leak_inbound(account: Served, version: int) -> None:
    """Whoever answers SYNs with a raw socket accepts connections that nobody else sees."""
    packet = ip(version) / TCP(sport=PORT, dport=4001, flags="SA", seq=7, ack=9)
    account.application(by_hand(packet, version)).result()
    if account.mode == "ebpf":
        only(account)
        return
    (one,) = account.records(1)
    assert (fate(one), one.local) == ((IN, Fate.LEAKED, Reason.RAW), (POD[version], PORT))
    only(account, fate(one))
