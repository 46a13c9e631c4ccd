# SPDX-License-Identifier: Apache-2.0
"""Accounting without eBPF on real packets: what it tells equals what the applications counted themselves."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.diag_account import EVERYTHING, IN, OUT, Counted, Talk, Watched, exempt, watched_pod
from support.node import until
from support.ztunnel import NFT, PEER4, PEER6, POD4, POD6, SECONDS

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpState
from agent.flows.record import Closer, Fate, How, Reason
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag

pytestmark = pytest.mark.root
COUNT = 300
PRESERVE = "tcp flags & (fin|syn|rst|ack) != syn accept"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with watched_pod(tmp_path) as made:
        yield made


@pytest.mark.parametrize("address", [PEER4, PEER6])
def test_p83_captured_outbound_connections_are_counted_to_the_byte(watched: Watched, address: str) -> None:
    watched.enrol()
    talk = Talk(watched.lab.peer, address, 8080, 1)
    threads = talk.serve(COUNT)
    for number in range(COUNT):
        talk.client(watched.lab.pod, address, 8080, threads)
        if number % 40 == 0:
            watched.refresh()
            watched.read()
    for one in threads:
        one.join(SECONDS)
    found = watched.records(COUNT, ztunnel=2 * COUNT)
    assert {(one.fate, one.direction, one.remote) for one in found} == {(Fate.CAPTURED, OUT, (address, 8080))}
    told = {one.local: Counted(one.sent, one.received) for one in found}
    assert told == talk.clients
    assert {one.peer[1] for one in found if one.peer} == {15001}
    assert {one.how for one in found} == {How.FIN}
    totals = dict(pod=watched.pod, direction=OUT, fate=Fate.CAPTURED, remote=address, port=8080)
    assert watched.sum("opened", **totals) == watched.sum("closed", **totals) == COUNT
    assert watched.sum("sent", **totals) == sum(one.sent for one in talk.clients.values())
    assert watched.sum("received", **totals) == sum(one.received for one in talk.clients.values())
    assert watched.sum("opened", fate=Fate.LEAKED) == watched.sum("failed") == 0
    assert watched.collector.totals()[OUT, Fate.CAPTURED, Reason.NONE] == COUNT
    assert watched.sum("closed", reason=Reason.ZTUNNEL) == 2 * COUNT  # what it accepted, and what it connected
    assert dict(watched.collector.losses()) == {"notifications": 0, "endings": 0}


@pytest.mark.parametrize("address", [POD4, POD6])
def test_captured_inbound_connections_are_counted_to_the_byte(watched: Watched, address: str) -> None:
    watched.enrol()
    talk = Talk(watched.lab.pod, address, 8080, 2)
    threads = talk.serve(COUNT)
    for number in range(COUNT):
        talk.client(watched.lab.peer, address, 8080, threads)
        if number % 40 == 0:
            watched.refresh()
            watched.read()
    for one in threads:
        one.join(SECONDS)
    found = watched.records(COUNT, ztunnel=2 * COUNT)
    assert {(one.fate, one.direction, one.local) for one in found} == {(Fate.CAPTURED, IN, (address, 8080))}
    assert {one.remote: Counted(one.sent, one.received) for one in found} == talk.servers
    totals = dict(direction=IN, fate=Fate.CAPTURED, port=8080)
    assert watched.sum("sent", **totals) == sum(one.sent for one in talk.servers.values())
    assert watched.sum("received", **totals) == sum(one.received for one in talk.servers.values())
    assert watched.sum("closed", reason=Reason.ZTUNNEL) == 2 * COUNT
    assert watched.sum("opened", fate=Fate.LEAKED) == 0


def test_exempt_connections_are_counted_to_the_byte_at_both_ends(watched: Watched) -> None:
    """Nothing in the namespace has the other end, so FINs are told by this end alone."""
    lab = watched.lab
    run(["nft", "flush", "ruleset"], netns=lab.pod.path)
    ports = ((8080, 8080),)
    watched.enrol(Redirect(exclude=Exclusions(outbound_ports=ports, inbound_ports=ports)))
    sides = [(lab.pod, lab.peer, PEER4, 3), (lab.peer, lab.pod, POD4, 4)]
    talks = []
    for client, server, address, seed in sides:
        talk = Talk(server, address, 8080, seed)
        threads = talk.serve(COUNT)
        for _ in range(COUNT):
            talk.client(client, address, 8080, threads)
        for one in threads:
            one.join(SECONDS)
        talks.append(talk)
    found = watched.records(2 * COUNT)
    assert {exempt(one) for one in found} == {(way, Fate.EXEMPT, Reason.EXCLUDED_PORT) for way in (OUT, IN)}
    told = {one.local: Counted(one.sent, one.received) for one in found if one.direction is OUT}
    assert told == talks[0].clients
    told = {one.remote: Counted(one.sent, one.received) for one in found if one.direction is IN}
    assert {name: told[name] for name in told.keys() - talks[1].doubtful} == {
        name: count for name, count in talks[1].servers.items() if name not in talks[1].doubtful
    }
    for name in talks[
        1
    ].doubtful:  # the client's FIN may have come after the end: see agent.flows.inet_diag.ending.received
        assert told[name].sent == talks[1].servers[name].sent
        assert talks[1].servers[name].received - told[name].received in (0, 1)
    assert talks[1].doubtful


def test_a_leak_is_one_and_a_connection_beside_it_is_not(watched: Watched) -> None:
    """Rules that are gone for a moment: what lives is told, what has ended is, and what has its own reason is not."""
    lab = watched.lab
    watched.enrol(Redirect(exclude=Exclusions(outbound_ports=((9999, 9999),))))
    captured = lab.outbound()
    captured[0].sendall(b"hello")
    assert captured[1].recv(5, socket.MSG_WAITALL) == b"hello"
    run(["nft", "flush", "ruleset"], netns=lab.pod.path)
    leaked, short, inbound, excluded = lab.outbound(), lab.outbound(), lab.inbound(), lab.outbound(port=9999)
    for near, far in (leaked, short, inbound, excluded):
        near.sendall(b"hello")
        assert far.recv(5, socket.MSG_WAITALL) == b"hello"
    short_name = short[0].getsockname()
    short[0].close()
    assert short[1].recv(1) == b""
    short[1].close()
    watched.refresh()
    live = {one.local: exempt(one) for one in watched.refresh()}
    assert live == {
        captured[0].getsockname(): (OUT, Fate.CAPTURED, Reason.NONE),
        leaked[0].getsockname(): (OUT, Fate.LEAKED, Reason.NONE),
        inbound[1].getsockname(): (IN, Fate.LEAKED, Reason.NONE),
        excluded[0].getsockname(): (OUT, Fate.EXEMPT, Reason.EXCLUDED_PORT),
    }
    one = watched.record(short_name)
    assert exempt(one) == (OUT, Fate.UNDECIDED, Reason.NONE), "no dump has shown that it is not ztunnel's"
    assert (one.sent, one.received, one.how, one.closer) == (5, 0, How.FIN, Closer.LOCAL)
    watched.refresh()
    assert watched.sum("opened", fate=Fate.LEAKED, direction=OUT) == 1
    assert watched.sum("sent", fate=Fate.LEAKED, direction=OUT) == 5
    assert watched.sum("received", fate=Fate.LEAKED, direction=IN) == 5


def test_a_forged_mark_is_a_leak(watched: Watched) -> None:
    lab = watched.lab
    watched.enrol()
    with lab.peer.listen(PEER4, 8080) as listener, lab.pod.make() as forger:
        forger.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        forger.connect((PEER4, 8080))
        far, _ = listener.accept()
        with far:
            watched.refresh()
            (one,) = watched.refresh()
            assert (one.local, one.fate) == (forger.getsockname(), Fate.LEAKED)
        with lab.pod.make() as short:  # never in a dump
            short.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
            short.connect((PEER4, 8080))
            name = short.getsockname()
            listener.accept()[0].close()
    assert watched.record(name).fate is Fate.UNDECIDED


@pytest.mark.parametrize("seen", [True, False])
def test_loopback_has_two_ends_and_both_are_exempt(watched: Watched, seen: bool) -> None:
    watched.enrol()
    pod = watched.lab.pod
    with pod.listen("127.0.0.1", 80) as listener:
        near = pod.connect("127.0.0.1", 80)
        far, _ = listener.accept()
        name = near.getsockname()
        near.sendall(b"four")
        if seen:
            assert {exempt(one) for one in watched.refresh()} == {(w, Fate.EXEMPT, Reason.LOOPBACK) for w in (OUT, IN)}
        assert far.recv(4) == b"four"
        far.close()
        near.close()
    out, back = watched.record(name), watched.record(("127.0.0.1", 80))
    assert exempt(out) == (OUT, Fate.EXEMPT, Reason.LOOPBACK) and exempt(back) == (IN, Fate.EXEMPT, Reason.LOOPBACK)
    assert (out.sent, out.received, back.sent, back.received) == (4, 0, 0, 4)
    assert (out.closer, back.closer) == (Closer.REMOTE, Closer.LOCAL)


def test_p55_older_connections_are_exempt_and_only_what_they_add_is_counted(watched: Watched) -> None:
    lab = watched.lab
    captured = lab.outbound()
    run(["nft", "flush", "ruleset"], netns=lab.pod.path)
    out, back = lab.outbound(), lab.inbound()
    out[0].sendall(bytes(1000))
    assert len(out[1].recv(1000, socket.MSG_WAITALL)) == 1000
    diag = watched.target.netns.call(SockDiag)  # the acknowledgement may come later than the data
    until(lambda: not any(one.unacked for one in diag.reports((TcpState.ESTABLISHED,))[0]), "it is acknowledged")
    diag.close()
    watched.enrol(captured=False)
    between = lab.outbound()
    between[0].sendall(b"hello")
    lenient = re.sub(r"(istio-(?:pre|out)\w+ \{)(?=\s+meta l4proto tcp ip)", rf"\1 {PRESERVE}", NFT)
    assert lenient.count(PRESERVE) == 2
    run(["nft", "-f", "-"], stdin=lenient, netns=lab.pod.path)
    watched.enrol()
    later = lab.outbound()
    for end in (out[0], later[0], captured[0]):
        end.sendall(b"hello")
    watched.refresh()
    live = {one.local: exempt(one) for one in watched.refresh()}
    assert live == {
        captured[0].getsockname(): (OUT, Fate.CAPTURED, Reason.NONE),
        out[0].getsockname(): (OUT, Fate.EXEMPT, Reason.BEFORE),
        back[1].getsockname(): (IN, Fate.EXEMPT, Reason.BEFORE),
        between[0].getsockname(): (OUT, Fate.EXEMPT, Reason.BEFORE),
        later[0].getsockname(): (OUT, Fate.CAPTURED, Reason.NONE),
    }
    until(lambda: watched.refresh() and watched.sum("sent", reason=Reason.BEFORE) >= 10, "it is acknowledged")
    assert watched.sum("sent", reason=Reason.BEFORE) == 10
    name = out[0].getsockname()
    for end in out:
        end.close()
    one = watched.record(name)
    assert (one.sent, one.reason) == (1005, Reason.BEFORE)


def test_only_what_lived_before_and_is_counted_by_nobody_is_followed_beside_another_collector(watched: Watched) -> None:
    """What is made or ends while the other collector is asked is in one dump alone, and belongs to the other one."""
    lab = watched.lab
    run(["nft", "flush", "ruleset"], netns=lab.pod.path)
    old, counted, ending = lab.outbound(), lab.outbound(), lab.outbound()

    def asked() -> set[int]:
        for end in ending:
            end.close()
        lab.outbound()
        return {int.from_bytes(counted[0].getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)}  # SO_COOKIE

    watched.collector.enrol(watched.target, EVERYTHING, captured=True, besides=asked)
    lab.outbound()
    watched.refresh()
    assert [one.local for one in watched.refresh()] == [old[0].getsockname()]
    name = old[0].getsockname()
    for end in old:
        end.close()
    assert watched.record(name).reason is Reason.BEFORE
    watched.refresh()
    watched.collector.change(watched.target, Redirect(ipv6=False), captured=True)  # the last of them has ended
    later = lab.outbound()
    assert watched.refresh() == []
    later[0].close()
    watched.finish()
    assert [one.local for one in watched.told] == [name]
    assert watched.sum("opened") == watched.sum("closed") == 1


def test_an_enrolment_takes_three_descriptors_and_gives_them_back(watched: Watched) -> None:
    count = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    watched.target.wiring()
    before = count()
    for _ in range(3):
        watched.enrol()
    assert count() == before + 3
    watched.collector.release(watched.pod)
    watched.collector.release(watched.pod)
    assert count() == before
