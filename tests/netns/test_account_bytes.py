# SPDX-License-Identifier: Apache-2.0
"""Every byte is accounted for: what records and totals say equals what the applications counted themselves.

A worker on either side of each connection, and between the two a line beside it, by which one tells the other what it
knows: after a reset nothing else can be said. One worker is an application's, the other one is ztunnel's.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import pytest
from support.accounting import MODES, Account, accounted
from support.applications import cookie, dial, flushed, receive, reset
from support.ebpf_pod import APP, PEER, POD, family

from agent.backends.ebpf import object_files
from agent.backends.ebpf.attachments import Change, Load
from agent.core.errors import KernelError
from agent.flows.ebpf.account_programs import Programs
from agent.flows.record import Closer, Connection, Direction, Fate, How, Reason

pytestmark = pytest.mark.root
WORKERS = 4
PORT = 9000
OUT, IN = Direction.OUTBOUND, Direction.INBOUND
HEADER = struct.Struct("=IIII")  # worker, end, bytes there, bytes back
SIZES = (0, 1, 100, 1448, 20_000, 65_536, 300_000)


class End(IntEnum):
    """How a connection ends."""

    CLIENT = 0
    SERVER = 1
    HALF_CLIENT = 2
    HALF_SERVER = 3
    CLIENT_RESETS = 4
    SERVER_RESETS = 5
    BOTH = 6


@dataclass(frozen=True)
class Counted:
    """One end of a connection, by its own count."""

    end: End
    sent: int
    received: int


def client(
    connect: Callable[[], socket.socket], worker: int, line: socket.socket, seed: int, count: int
) -> dict[int, Counted]:
    """Socket -> what it counted."""
    dice, found = random.Random(seed * WORKERS + worker), {}
    for _ in range(count):
        end, there, back = End(dice.randrange(7)), dice.choice(SIZES), dice.choice(SIZES)
        there, back = dice.randint(there // 2, there), dice.randint(back // 2, back)
        sock = connect()
        number = cookie(sock)
        number = cookie(sock)
        sock.sendall(HEADER.pack(worker, end, there, back))
        if end is End.HALF_SERVER:
            assert receive(sock, back + 1) == back
            sock.sendall(bytes(there))
        else:
            sock.sendall(bytes(there))
            if end is End.HALF_CLIENT:
                sock.shutdown(socket.SHUT_WR)
            whole = end in (End.HALF_CLIENT, End.SERVER)
            assert receive(sock, back + whole) == back
        finish(sock, line, end, first=end is End.CLIENT, resets=end is End.CLIENT_RESETS)
        found[number] = Counted(end, HEADER.size + there, back)
    return found


def serve(sock: socket.socket, lines: list[socket.socket], turns: list[threading.Lock]) -> tuple[int, Counted]:
    number = cookie(sock)
    header = b""
    while len(header) < HEADER.size:
        part = sock.recv(HEADER.size - len(header))
        assert part, "a whole header"
        header += part
    worker, end, there, back = HEADER.unpack(header)
    with turns[worker]:  # what is said on the line is not for whoever serves its next connection
        answer(sock, lines[worker], End(end), there, back)
    return number, Counted(End(end), back, HEADER.size + there)


def answer(sock: socket.socket, line: socket.socket, end: End, there: int, back: int) -> None:
    if end is End.HALF_SERVER:
        sock.sendall(bytes(back))
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, there) == there
    else:
        assert receive(sock, there + (end is End.HALF_CLIENT)) == there
        sock.sendall(bytes(back))
    finish(sock, line, end, first=end is End.SERVER, resets=end is End.SERVER_RESETS)


def finish(sock: socket.socket, line: socket.socket, end: End, *, first: bool, resets: bool) -> None:
    """Closes, and returns when the other end has closed, too."""
    if end in (End.CLIENT_RESETS, End.SERVER_RESETS, End.BOTH):
        flushed(sock)
        meet(line)
    if resets:
        reset(sock)
        meet(line)
        return
    if end in (End.CLIENT_RESETS, End.SERVER_RESETS):
        meet(line)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    elif end in (End.CLIENT, End.SERVER) and not first:
        assert not sock.recv(1)
    sock.close()
    if end not in (End.CLIENT_RESETS, End.SERVER_RESETS):
        meet(line)


def meet(line: socket.socket) -> None:
    line.send(b"x")
    assert line.recv(1) == b"x"


def in_threads(tasks: list[Callable[[], object]]) -> list[object]:
    """Their values."""
    results, failed = list[object](), list[BaseException]()

    def run(task: Callable[[], object]) -> None:
        try:
            results.append(task())
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in tasks]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failed:
        raise failed[0]
    return results


def serving(listening: socket.socket, lines: list[socket.socket], count: int) -> dict[int, Counted]:
    """All that come."""
    found = dict[int, Counted]()
    left, turns = iter(range(count)), [threading.Lock() for _ in lines]

    def one_after_the_other() -> None:
        for _ in left:
            sock, _ = listening.accept()
            sock.settimeout(20)
            number, counted = serve(sock, lines, turns)
            found[number] = counted

    in_threads([one_after_the_other] * len(lines))
    return found


def lines(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(count)]
    for pair in made:
        for one in pair:
            one.settimeout(30)
    return [one for one, _ in made], [one for _, one in made]


@dataclass(frozen=True)
class Talked:
    """`pod` are the ends that the pod's applications have."""

    pod: dict[int, Counted]
    other: list[Counted]


def outbound(account: Account, kind: str, count: int, seed: int = 0) -> Talked:
    """Applications in the pod connect; ztunnel is at the other end."""
    near, far = lines(WORKERS)
    where, each = (PEER[family(kind)], APP), count // WORKERS

    def work(number: int) -> dict[int, Counted]:
        return client(lambda: dial(kind, where), number, near[number], seed, each)

    children = [account.application(lambda n=n: work(n), keep=(near[n].fileno(),)) for n in range(WORKERS)]
    told = dict[int, Counted]()
    other = serving(account.ztunnel.outbound, far, each * WORKERS)
    for child in children:
        told |= child.result()
    return Talked(told, list(other.values()))


def inbound(account: Account, kind: str, count: int, seed: int = 0) -> Talked:
    """ztunnel connects to the application in the name of clients."""
    near, far = lines(WORKERS)
    each = count // WORKERS

    def app(listening: socket.socket) -> dict[int, Counted]:
        return serving(listening, far, each * WORKERS)

    def work(number: int) -> dict[int, Counted]:
        where = POD[family(kind)], PORT
        return client(lambda: account.relay(kind, where), number, near[number], seed, each)

    child = account.serving(app, port=PORT, keep=[one.fileno() for one in far])
    other = in_threads([lambda n=n: work(n) for n in range(WORKERS)])
    return Talked(child.result(), [one for each in other for one in each.values()])


# What the record says: who closed, and how; of a connection whose own end is the client, or the server.
ENDS = {
    True: {
        End.CLIENT: (How.FIN, Closer.LOCAL),
        End.SERVER: (How.FIN, Closer.REMOTE),
        End.HALF_CLIENT: (How.FIN, Closer.LOCAL),
        End.HALF_SERVER: (How.FIN, Closer.REMOTE),
        End.CLIENT_RESETS: (How.RESET, Closer.LOCAL),
        End.SERVER_RESETS: (How.RESET, Closer.REMOTE),
    },
    False: {
        End.CLIENT: (How.FIN, Closer.REMOTE),
        End.SERVER: (How.FIN, Closer.LOCAL),
        End.HALF_CLIENT: (How.FIN, Closer.REMOTE),
        End.HALF_SERVER: (How.FIN, Closer.LOCAL),
        End.CLIENT_RESETS: (How.RESET, Closer.REMOTE),
        End.SERVER_RESETS: (How.RESET, Closer.LOCAL),
    },
}


def check(account: Account, talks: dict[Direction, list[Talked]]) -> None:
    """Each record, and the sums of all totals."""
    ends = {number: one for each in talks.values() for talked in each for number, one in talked.pod.items()}
    found = account.records(len(ends))
    assert {(one.fate, one.pod) for one in found} == {(Fate.CAPTURED, account.pod.cookie)}
    assert {one.socket: (one.sent, one.received) for one in found} == {
        number: (one.sent, one.received) for number, one in ends.items()
    }
    for one in found:
        check_end(one, ends[one.socket].end)
    for direction, each in talks.items():
        own = [one for talked in each for one in talked.pod.values()]
        other = [one for talked in each for one in talked.other]
        sent, received = sum(one.sent for one in own), sum(one.received for one in own)
        assert (sum(one.received for one in other), sum(one.sent for one in other)) == (sent, received)
        assert account.sums(direction=direction, fate=Fate.CAPTURED) == totals(len(own), len(own), sent, received)
        assert len([one for one in found if one.direction is direction]) == len(own)
    assert {(one.fate, one.reason) for one in account.deltas} <= {
        (Fate.CAPTURED, Reason.NONE),
        (Fate.EXEMPT, Reason.ZTUNNEL),
    }
    assert sum(sum(one.duration) for one in account.qualities) == len(ends)
    for name in ("segments_out", "segments_in", "retransmitted"):
        assert sum(getattr(one, name) for one in account.qualities) == sum(getattr(one, name) for one in found)
    assert account.losses() == 0


def check_end(one: Connection, end: End) -> None:
    if end in ENDS[True]:
        assert (one.how, one.closer) == ENDS[one.direction is Direction.OUTBOUND][end], (one, end)
    else:
        assert one.how is How.FIN and one.closer in (Closer.LOCAL, Closer.REMOTE)
    # The kernel does not count the SYN|ACK to a socket that it had not made yet.
    assert one.segments_out >= 1 + one.sent // 65536 and one.segments_in >= 1 + one.received // 65536, one
    assert one.segments_out <= 20 + one.sent // 500 + one.received // 500 and one.established, one
    assert one.closed is not None and one.closed >= one.opened


@pytest.fixture(params=MODES)
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    with accounted(request.param) as made:
        yield made


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_every_byte_is_told_however_it_ends(account: Account, kind: str) -> None:
    check(account, {OUT: [outbound(account, kind, 500)], IN: [inbound(account, kind, 500)]})


def test_totals_are_right_while_connections_end_under_the_iterator(account: Account) -> None:
    with account.refreshing() as counted:
        talks = {OUT: [outbound(account, "IPv4", 500)], IN: [inbound(account, "IPv4", 500)]}
    assert counted["refreshed"] > 20
    check(account, talks)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["nftables", "ebpf"])
def test_ten_thousand_connections_to_the_byte(mode: str) -> None:
    with accounted(mode) as account, account.refreshing():
        talks = {
            direction: [way(account, kind, 2500, seed) for seed, kind in enumerate(("IPv4", "IPv6"))]
            for direction, way in ((OUT, outbound), (IN, inbound))
        }
        check(account, talks)


@pytest.fixture(params=["of the kernel's choice", "files"])
def walked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the iterators go over: with `files` the kernel refuses those over a map, as some do."""
    load = Programs._do

    def refuse(programs: Programs, change: Change) -> None:
        if change == Load(object_files.REFRESH.object):
            raise KernelError("load", errno.EPERM, "Operation not permitted")
        load(programs, change)

    if request.param == "files":
        monkeypatch.setattr(Programs, "_do", refuse)


@pytest.mark.usefixtures("walked")
@pytest.mark.parametrize("mode", MODES)
def test_what_lives_is_counted_while_it_lives(mode: str) -> None:
    """Bytes so far, in totals and lists, and not once more at the end."""
    with accounted(mode) as account:
        near, far = lines(1)

        def whole() -> int:
            sock = dial("IPv4", (PEER[4], APP))
            number = cookie(sock)
            for there, back in ((70_000, 30_000), (5, 7)):
                sock.sendall(bytes(there))
                assert receive(sock, back) == back
                flushed(sock)
                meet(near[0])
                meet(near[0])
            sock.close()
            return number

        child = account.application(whole, keep=[near[0].fileno()])
        sock, _ = account.ztunnel.outbound.accept()
        for there, back, both in ((70_000, 30_000, (70_000, 30_000)), (5, 7, (70_005, 30_007))):
            assert receive(sock, there) == there
            sock.sendall(bytes(back))
            meet(far[0])
            assert account.sums(fate=Fate.CAPTURED) == totals(1, 0, *both)
            (one,) = account.collector.live()
            assert (one.sent, one.received, one.fate, one.closed) == (*both, Fate.CAPTURED, None)
            assert [each.socket for each in account.collector.live(account.pod.cookie)] == [one.socket]
            assert not account.collector.live(1)
            assert account.read() == []
            meet(far[0])
        assert not sock.recv(1)
        sock.close()
        number = child.result()
        (last,) = account.records(1)
        assert (last.socket, last.sent, last.received, one.socket) == (number, *both, number)
        assert account.sums(fate=Fate.CAPTURED) == totals(1, 1, *both) and not account.collector.live()


def totals(opened: int, closed: int, sent: int, received: int, failed: int = 0) -> Counter[str]:
    return Counter(opened=opened, closed=closed, sent=sent, received=received, failed=failed)
