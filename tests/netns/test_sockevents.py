# SPDX-License-Identifier: Apache-2.0
"""Notifications of the end of sockets: what they count, against what the sockets did; and what gets lost is told."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from support.node import until
from support.pair import HOST4, HOST6, POD4, POD6, Pair, pair, stream
from support.ztunnel import abort, read_all

from agent.core.model.sockets import TcpState
from agent.core.wire.tcp_info import TcpReport
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netlink.sock_events import SocketEvents

pytestmark = pytest.mark.root


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture
def events(nodes: Pair) -> Iterator[SocketEvents]:
    with contextlib.closing(nodes.target.netns.call(SocketEvents)) as made:
        yield made


def told(events: SocketEvents, count: int = 1) -> list[TcpReport]:
    """Exactly so many, nothing lost."""
    found: list[TcpReport] = []

    def enough() -> bool:
        reports, lost = events.take()
        assert not lost
        found.extend(reports)
        return len(found) >= count

    until(enough, f"{count} ends")
    assert len(found) == count
    return found


@pytest.mark.parametrize(("host", "pod"), [(HOST4, POD4), (HOST6, POD6)], ids=["ipv4", "ipv6"])
def test_payload_syn_and_fin_in_the_counts(nodes: Pair, events: SocketEvents, host: str, pod: str) -> None:
    """Of the side that connects SYN and FIN, of the side that accepts the FIN; of what was received the FIN."""
    near, far = stream(nodes.pod, nodes.host, host, 7000)
    name, cookie = near.getsockname()[:2], int.from_bytes(near.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
    near.sendall(bytes(100))
    near.shutdown(socket.SHUT_WR)
    assert len(read_all(far)) == 100
    far.sendall(bytes(30))
    far.close()
    assert len(read_all(near)) == 30
    near.close()
    (one,) = told(events)
    assert (one.socket.local, one.socket.remote, one.socket.cookie) == (name, (host, 7000), cookie)
    assert (one.socket.state, one.unread, one.unacked, one.used) == (TcpState.CLOSE, 0, 0, True)
    assert (one.info.acked, one.info.received, one.info.unique, one.info.beyond) == (102, 31, 100, 2)
    client, server = stream(nodes.host, nodes.pod, pod, 7001)
    server.sendall(bytes(5))
    server.shutdown(socket.SHUT_WR)
    assert len(read_all(client)) == 5
    client.sendall(bytes(7))
    client.close()
    assert len(read_all(server)) == 7
    server.close()
    (one,) = told(events)
    assert (one.info.acked, one.info.received, one.info.beyond) == (6, 8, 1)
    assert 0 < one.info.rtt < 10_000_000 and one.info.segments_in > 2 and one.info.retransmitted == 0


def test_a_fin_that_nobody_read_is_unread(nodes: Pair, events: SocketEvents) -> None:
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    far.close()
    with contextlib.closing(nodes.target.netns.call(SockDiag)) as diag:
        until(lambda: diag.both((TcpState.CLOSE_WAIT,)), "the FIN has come")
    near.close()
    (one,) = told(events)
    assert (one.unread, one.info.received, one.info.data_in) == (1, 1, 0)


def test_the_peers_fin_after_the_end_is_not_counted_and_the_timer_tells(nodes: Pair, events: SocketEvents) -> None:
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    with far, contextlib.closing(nodes.target.netns.call(SockDiag)) as diag:
        near.close()
        assert far.recv(1) == b""
        (one,) = told(events)
        assert (one.unread, one.info.received, one.info.beyond) == (0, 0, 2)
        states = (TcpState.FIN_WAIT2, TcpState.TIME_WAIT)
        assert diag.reports(states) == ([], {one.ends: TcpState.FIN_WAIT2})
        far.close()
        until(lambda: diag.reports(states) == ([], {one.ends: TcpState.TIME_WAIT}), "the FIN has come")


def test_a_socket_that_resets_itself_has_forgotten_all(nodes: Pair, events: SocketEvents) -> None:
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    near.sendall(bytes(100))
    assert len(far.recv(100, socket.MSG_WAITALL)) == 100
    abort(near)
    far.close()
    (one,) = told(events)
    assert one.disconnected and one.used and one.socket.remote == (HOST4, 0)
    assert (one.info.acked, one.info.segments_in) == (0, 0) and one.unacked > 3
    with nodes.pod.make() as end:
        end.settimeout(None)  # a connect that waits
        with pytest.raises(ConnectionRefusedError):
            end.connect((HOST4, 9))
    (one,) = told(events)
    assert one.disconnected and one.unacked == 3


def test_what_never_was_a_connection_is_left_out(nodes: Pair, events: SocketEvents) -> None:
    nodes.pod.make().close()
    nodes.pod.listen("0.0.0.0", 80).close()
    nodes.pod.make(socket.AF_INET6).close()
    near, far = stream(nodes.host, nodes.host, HOST4, 7000)  # nor what is another namespace's
    near.close()
    far.close()
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    near.close()
    far.close()
    assert [one.socket.remote for one in told(events)] == [(HOST4, 7000)]


def test_what_is_lost_is_told_and_the_next_is_not(nodes: Pair) -> None:
    with contextlib.closing(nodes.target.netns.call(lambda: SocketEvents(buffer=1))) as events:
        for _ in range(50):
            for end in stream(nodes.pod, nodes.host, HOST4, 7000):
                end.close()
        reports, lost = [], False

        def enough() -> bool:
            more, missing = events.take()
            reports.extend(more)
            nonlocal lost
            lost = lost or missing
            return lost

        until(enough, "some are lost")
        while events.take()[0]:
            pass
        assert len(reports) < 50

        def told_again() -> bool:  # late ones of before may take the little room
            near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
            with near, far:
                name = near.getsockname()
            return name in [one.socket.local for one in events.take()[0]]

        until(told_again, "one that came later")


def test_a_thousand_wait_without_loss(nodes: Pair, events: SocketEvents) -> None:
    with nodes.host.listen(HOST4, 7000) as listener:
        for _ in range(1000):
            nodes.pod.connect(HOST4, 7000).close()
            listener.accept()[0].close()
    assert len({one.socket.cookie for one in told(events, 1000)}) == 1000
    assert run(["ss", "-tanH", "state", "established"], netns=nodes.pod.path).stdout == ""
