# SPDX-License-Identifier: Apache-2.0
"""How a connection ended, and who ended it, as the application's own socket has seen it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator

import pytest
from support.accounting import MODES, Account, accounted
from support.applications import cookie, dial, flushed, receive, reset
from support.ebpf_pod import APP, PEER, POD, SECONDS, accepted, family
from support.node import until

from agent.flows.record import Closer, Connection, Direction, Fate, How

pytestmark = pytest.mark.root
TCP_USER_TIMEOUT = 18  # linux/tcp.h
LOCAL, REMOTE, NOBODY = Closer.LOCAL, Closer.REMOTE, Closer.NONE
PORT = 9000


@pytest.fixture(params=MODES)
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    with accounted(request.param) as made:
        yield made


class Line:
    """Between an application and the test: each waits until the other one has come so far."""

    def __init__(self) -> None:
        self.ends = socket.socketpair()
        for one in self.ends:
            one.settimeout(SECONDS)

    def meet(self, end: int) -> None:
        self.ends[end].send(b"x")
        assert self.ends[end].recv(1) == b"x"


Act = Callable[[socket.socket], object]


def ended(account: Account, app: Act, other: Act, *, inbound: bool = False, kind: str = "IPv4") -> Connection:
    """`app` at the application's end, then `other` at ztunnel's, when both have said a word; the record."""
    line = Line()

    def run(sock: socket.socket) -> int:
        number = cookie(sock)
        sock.settimeout(SECONDS)
        sock.sendall(b"x")
        assert sock.recv(1)
        flushed(sock)
        line.meet(0)
        app(sock)
        line.meet(0)
        sock.close()
        return number

    keep = [line.ends[0].fileno()]
    if inbound:
        child = account.serving(lambda listening: run(listening.accept()[0]), port=PORT, keep=keep)
        sock = account.relay(kind, (POD[family(kind)], PORT))
    else:
        child = account.application(lambda: run(dial(kind, (PEER[family(kind)], APP))), keep=keep)
        sock = accepted(account.ztunnel.outbound)
    with sock:
        sock.sendall(b"y")
        assert sock.recv(1)
        flushed(sock)
        line.meet(1)
        other(sock)
        line.meet(1)
    found = account.record(child.result())
    assert (found.fate, found.direction, found.established) == (Fate.CAPTURED, Direction(inbound), True)
    assert found.closed is not None and not account.losses()
    return found


def close(sock: socket.socket) -> None:
    sock.close()


def until_end(sock: socket.socket) -> None:
    receive(sock, 1 << 20)


def until_reset(sock: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def with_something_unread(sock: socket.socket) -> None:
    until(lambda: sock.recv(1, socket.MSG_PEEK), "something has come")
    sock.close()


def half(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    until_end(sock)


def says_more(sock: socket.socket) -> None:
    until_end(sock)
    sock.sendall(b"more")
    sock.close()


def half_until_reset(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    until_reset(sock)


def end_then_reset(sock: socket.socket) -> None:
    until_end(sock)
    reset(sock)


ENDS = {
    "fin": (close, until_end, How.FIN, LOCAL, 1, 1),
    "fin-remote": (until_end, close, How.FIN, REMOTE, 1, 1),
    "half": (half, says_more, How.FIN, LOCAL, 1, 5),
    "half-remote": (says_more, half, How.FIN, REMOTE, 5, 1),
    "reset": (reset, until_reset, How.RESET, LOCAL, 1, 1),
    "reset-remote": (until_reset, reset, How.RESET, REMOTE, 1, 1),
    "unread": (with_something_unread, lambda sock: (sock.sendall(b"z"), until_reset(sock)), How.RESET, LOCAL, 1, 2),
    "half-then-reset": (half_until_reset, end_then_reset, How.RESET, REMOTE, 1, 1),
    "end-then-reset": (end_then_reset, half_until_reset, How.RESET, LOCAL, 1, 1),
}


@pytest.mark.parametrize("inbound", [False, True], ids=["outbound", "inbound"])
@pytest.mark.parametrize("case", ENDS)
def test_by_fin_or_rst(account: Account, case: str, inbound: bool) -> None:
    app, other, how, closer, sent, received = ENDS[case]
    one = ended(account, app, other, inbound=inbound)
    assert (one.how, one.closer, one.sent, one.received) == (how, closer, sent, received)


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_ended_by_the_administrator(account: Account, kind: str) -> None:
    one = ended(account, until_aborted, lambda sock: kill(account, sock, kind), kind=kind)
    assert (one.how, one.closer) == (How.ABORTED, NOBODY)


def until_aborted(sock: socket.socket) -> None:
    with pytest.raises(OSError) as told:
        sock.recv(1)
    assert told.value.errno == errno.ECONNABORTED, told.value


def kill(account: Account, ztunnels: socket.socket, kind: str) -> None:
    """The application's socket, which is the one that has ztunnel's remote port as its own."""
    port = ztunnels.getpeername()[1]
    account.pod.sh(f"ss -K sport = :{port}")
    until(lambda: account.read(), "it has ended")


def test_both_at_once(account: Account) -> None:
    """Each has sent its FIN before the other's came: lo is down for a moment."""
    line = Line()

    def app() -> int:
        sock = dial("IPv4", (PEER[4], APP))
        number = cookie(sock)
        flushed(sock)
        line.meet(0)
        line.meet(0)
        sock.close()
        line.meet(0)
        return number

    child = account.application(app, keep=[line.ends[0].fileno()])
    sock = accepted(account.ztunnel.outbound)
    flushed(sock)
    line.meet(1)
    account.pod.sh("ip link set lo down")
    line.meet(1)
    line.meet(1)
    sock.close()
    account.pod.sh("ip link set lo up")
    one = account.record(child.result())
    assert (one.how, one.closer, one.sent, one.received) == (How.FIN, LOCAL, 0, 0)


def test_nobody_answers_any_more(account: Account) -> None:
    """lo is down, and the application's patience is short."""
    line = Line()

    def app() -> int:
        sock = dial("IPv4", (PEER[4], APP), options=((socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 300),))
        number = cookie(sock)
        sock.sendall(b"arrives")
        flushed(sock)
        line.meet(0)
        line.meet(0)
        sock.sendall(b"does not")
        with pytest.raises(TimeoutError) as told:
            sock.recv(1)
        assert told.value.errno == errno.ETIMEDOUT
        sock.close()
        return number

    child = account.application(app, keep=[line.ends[0].fileno()])
    with accepted(account.ztunnel.outbound) as sock:
        assert receive(sock, 7) == 7
        line.meet(1)
        account.pod.sh("ip link set lo down")
        line.meet(1)
        one = account.record(child.result())
    assert (one.how, one.closer, one.sent, one.received) == (How.TIMEOUT, NOBODY, 7, 0)
    assert one.retransmitted >= 1 and one.fate is Fate.CAPTURED
