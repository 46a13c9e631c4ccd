# SPDX-License-Identifier: Apache-2.0
"""Accounting without eBPF on real packets: what it tells equals what the applications counted themselves."""

from __future__ import annotations

import random
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.node import until
from support.ztunnel import NFT, PEER4, PEER6, POD4, POD6, SECONDS, Lab, Place, abort, labs, read_all

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpState
from agent.flows.inet_diag import collector as sockdiag
from agent.flows.inet_diag.collector import DiagCollector
from agent.flows.record import Closer, Connection, Delta, Direction, Fate, How, Reason
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netlink.sock_events import SocketEvents
from agent.kernel.pod_netns import PodNetns

pytestmark = pytest.mark.root
OUT, IN = Direction.OUTBOUND, Direction.INBOUND
COUNT = 300
EVERYTHING = Redirect()
PRESERVE = "tcp flags & (fin|syn|rst|ack) != syn accept"


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


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with labs(tmp_path) as lab:
        lab.serve()
        target = PodNetns(lab.pod.netns)
        made = Watched(lab, target, DiagCollector(held_by(lambda: lab.ztunnel.process.pid)))
        yield made
        made.collector.close()
        # The namespace's handle is the lab's.


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


def exempt(one: Connection) -> tuple[Direction, Fate, Reason]:
    return one.direction, one.fate, one.reason


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


@pytest.mark.parametrize("waits", [True, False])
def test_a_connect_that_is_refused_has_failed(watched: Watched, waits: bool) -> None:
    """Of one that somebody waited for the kernel has forgotten the port, and why."""
    watched.enrol(Redirect(exclude=Exclusions(outbound_ports=((9, 9),))))
    run(["nft", "flush", "ruleset"], netns=watched.lab.pod.path)
    with watched.lab.pod.make() as end:
        if waits:
            end.settimeout(None)
            with pytest.raises(ConnectionRefusedError):
                end.connect((PEER4, 9))
        else:
            end.setblocking(False)
            end.connect_ex((PEER4, 9))
            until(lambda: end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "it is refused")
    (one,) = watched.records(1)
    assert one.failed and one.direction is OUT and one.remote[0] == PEER4
    if waits:
        assert (one.how, one.closer, one.fate, one.remote[1]) == (How.UNKNOWN, Closer.NONE, Fate.UNDECIDED, 0)
    else:
        assert (one.how, one.closer, exempt(one)) == (
            How.REFUSED,
            Closer.REMOTE,
            (OUT, Fate.EXEMPT, Reason.EXCLUDED_PORT),
        )
    assert (watched.sum("failed"), watched.sum("opened"), watched.sum("closed")) == (1, 0, 0)


def test_what_ztunnel_cannot_reach_is_a_captured_connection_that_was_reset(watched: Watched) -> None:
    """ztunnel's own failed connect is no failure of the application's."""
    watched.enrol()
    with watched.lab.pod.make() as end, pytest.raises(ConnectionResetError):
        end.connect((PEER4, 9))
        end.recv(1)
    (one,) = watched.records(1)
    assert (exempt(one), one.how, one.closer) == ((OUT, Fate.CAPTURED, Reason.NONE), How.RESET, Closer.REMOTE)
    assert watched.sum("failed") == watched.sum("failed", reason=Reason.ZTUNNEL) == 1


@pytest.mark.parametrize("seen", [True, False])
def test_a_socket_that_resets_itself(watched: Watched, seen: bool) -> None:
    """It forgets its address and its counts: they are those of ztunnel's end, and of the last dump."""
    watched.enrol()
    near, far = watched.lab.outbound()
    near.sendall(bytes(100))
    assert len(far.recv(100, socket.MSG_WAITALL)) == 100
    far.sendall(bytes(50))
    assert len(near.recv(50, socket.MSG_WAITALL)) == 50
    name = near.getsockname()
    if seen:
        watched.refresh()
    abort(near)
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    one = watched.record(name if seen else ("0.0.0.0", name[1]))
    assert (exempt(one), one.how, one.closer) == ((OUT, Fate.CAPTURED, Reason.NONE), How.RESET, Closer.LOCAL)
    assert (one.sent, one.received) == (100, 50)
    assert one.remote == ((PEER4, 8080) if seen else (PEER4, 0))


def test_two_connections_with_one_local_port(watched: Watched) -> None:
    """ztunnel sees another port of the second one, for both would be one connection to it."""
    lab = watched.lab
    watched.enrol()
    with lab.peer.listen(PEER4, 8080) as one, lab.peer.listen(PEER4, 8081) as other, ExitStack() as kept:
        ends = []
        for listener in (one, other):
            end = kept.enter_context(lab.pod.make())
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind((POD4, 41234))
            end.connect((PEER4, listener.getsockname()[1]))
            far, _ = listener.accept()
            ends.append((end, far))
        with closing(watched.target.netns.call(SockDiag)) as diag:
            ztunnels = {one.remote for one in diag.both() if one.local[1] == 15001}
        assert (POD4, 41234) in ztunnels and len(ztunnels - {("0.0.0.0", 0), ("::", 0)}) == 2
        for size, (end, far) in zip((7, 9), ends, strict=True):
            end.sendall(bytes(size))
            assert len(far.recv(size, socket.MSG_WAITALL)) == size
            end.close()
            assert far.recv(1) == b""
            far.close()
    found = watched.records(2)
    assert {(one.fate, one.remote[1], one.sent) for one in found} == {
        (Fate.CAPTURED, 8080, 7),
        (Fate.CAPTURED, 8081, 9),
    }


def test_lost_notifications_are_counted_and_what_was_known_ends(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockdiag, "SocketEvents", lambda: SocketEvents(buffer=4096))
    lab = watched.lab
    watched.enrol()
    pairs = [lab.outbound() for _ in range(20)]
    watched.refresh()
    for near, far in pairs:
        near.close()
        assert far.recv(1) == b""
        far.close()
    until(lambda: len(watched.read()) >= 20, "all have ended")
    assert len({one.socket for one in watched.told}) == len(watched.told) == 20
    assert {one.fate for one in watched.told} == {Fate.CAPTURED}
    losses = watched.collector.losses()
    assert losses["notifications"] >= 1 and losses["endings"] >= 1
    watched.refresh()
    assert watched.sum("closed", fate=Fate.CAPTURED) == 20


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


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("resets", ["client", "server"])
@pytest.mark.parametrize("way", ["outbound", "inbound"])
def test_what_ends_by_a_reset_is_captured_all_the_same(watched: Watched, way: str, resets: str, seen: bool) -> None:
    """Who resets itself loses its addresses: an application, or ztunnel, which passes a reset on."""
    count = 15
    watched.enrol()
    for number in range(count):
        near, far = getattr(watched.lab, way)()
        near.sendall(b"hello")
        assert far.recv(5, socket.MSG_WAITALL) == b"hello"
        if seen and number == count // 2:
            watched.refresh()
        first, second = (near, far) if resets == "client" else (far, near)
        abort(first)
        with suppress(ConnectionResetError):
            second.recv(1)
        second.close()
    found = watched.records(count, ztunnel=2 * count)
    assert {(one.direction.word, one.fate, one.how) for one in found} == {(way, Fate.CAPTURED, How.RESET)}


def test_a_leak_that_is_cut_off_is_one_only_where_its_owner_was_seen(watched: Watched) -> None:
    lab = watched.lab
    run(["nft", "flush", "ruleset"], netns=lab.pod.path)
    watched.enrol()
    pairs = [lab.outbound(), lab.inbound()]
    watched.refresh()
    pairs += lab.outbound(), lab.inbound()
    for cut, other in pairs:
        abort(cut)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        other.close()
    fates = Counter((one.direction, one.fate) for one in watched.records(4))
    assert fates == {(way, fate): 1 for way in (OUT, IN) for fate in (Fate.LEAKED, Fate.UNDECIDED)}


def test_ports_that_are_used_again_make_no_leak_and_hide_none(watched: Watched) -> None:
    """ztunnel sees another port of seven in eight connections: conntrack still knows the first one."""
    lab = watched.lab
    watched.enrol()
    with ExitStack() as kept:
        listeners = [kept.enter_context(lab.peer.listen(PEER4, port)) for port in range(9000, 9008)]
        forger = kept.enter_context(lab.pod.make())
        forger.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        forger.connect((PEER4, 9000))
        kept.enter_context(listeners[0].accept()[0])
        for number in range(240):
            listener = listeners[number % len(listeners)]
            near = lab.pod.make()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            near.bind((POD4, 41000 + number // len(listeners)))
            near.connect(listener.getsockname())
            far, _ = listener.accept()
            near.sendall(bytes(1 + number % 3))
            assert far.recv(1)
            first, second = (near, far) if number % 4 < 2 else (far, near)
            abort(first) if number % 4 == 1 else first.close()
            with suppress(ConnectionResetError):
                second.recv(1)
            second.close()
            if number % 60 == 30:
                watched.refresh()
                watched.read()
        name = forger.getsockname()
    watched.record(name)
    watched.finish()
    fates = Counter(one.fate for one in watched.told)
    assert [one.local for one in watched.told if one.fate is Fate.LEAKED] == [name]
    assert fates[Fate.CAPTURED] >= 230 and fates[Fate.UNDECIDED] <= 10, fates


def test_nothing_leaked_of_which_a_notification_may_be_lost(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockdiag, "SocketEvents", lambda: SocketEvents(buffer=4096))
    watched.enrol()
    for _ in range(40):
        for end in watched.lab.outbound():
            end.close()
    until(lambda: watched.read() and watched.refresh() == [], "all have ended")
    watched.finish()
    assert watched.collector.losses()["notifications"]
    assert watched.sum("opened", fate=Fate.LEAKED) == 0
