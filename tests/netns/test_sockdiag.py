# SPDX-License-Identifier: Apache-2.0
"""What sock_diag tells of a namespace, against `ss`; every kind of socket, exact lookups, many sockets."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from collections.abc import Iterator

import pytest
from support.node import until
from support.pair import HOST4, HOST6, POD4, POD6, Pair, pair, stream

from agent.core.model.sockets import TcpSocket, TcpState
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag

pytestmark = pytest.mark.root
SS = {
    "ESTAB": TcpState.ESTABLISHED,
    "SYN-SENT": TcpState.SYN_SENT,
    "FIN-WAIT-2": TcpState.FIN_WAIT2,
    "TIME-WAIT": TcpState.TIME_WAIT,
    "CLOSE-WAIT": TcpState.CLOSE_WAIT,
    "LISTEN": TcpState.LISTEN,
}


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture
def diag(nodes: Pair) -> Iterator[SockDiag]:
    with contextlib.closing(nodes.target.netns.call(SockDiag)) as made:
        yield made


def seen_by_ss(nodes: Pair) -> list[TcpSocket]:
    """The same values, read from what ss prints."""
    found = []
    for line in run(["ss", "-taneH"], netns=nodes.pod.path).stdout.splitlines():
        state, _, _, local, remote, *rest = line.split()
        more = dict(part.split(":", 1) for part in rest if ":" in part)
        mark = int(more["fwmark"], 16) if "fwmark" in more else 0
        uid, inode, v6 = int(more.get("uid", 0)), int(more.get("ino", 0)), "[" in local or local.startswith("*")
        ends = [endpoint(local, v6), endpoint(remote, v6)]
        found.append(
            TcpSocket(
                6 if v6 else 4,
                ends[0],
                ends[1],
                SS[state],
                int(more["sk"], 16),
                uid,
                inode,
                mark,
                more.get("v6only") == "1",
            )
        )
    return found


def endpoint(text: str, v6: bool) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    address = {"*": "::" if v6 else "0.0.0.0"}.get(host, host.strip("[]").removeprefix("::ffff:"))
    return address, 0 if port == "*" else int(port)


def order(sockets: list[TcpSocket]) -> list[TcpSocket]:
    return sorted(sockets, key=lambda one: one.cookie)


def test_every_kind_of_socket_as_ss_shows_it(nodes: Pair, diag: SockDiag) -> None:
    pod, host = nodes.pod, nodes.host
    with contextlib.ExitStack() as kept:
        kept.enter_context(pod.listen("0.0.0.0", 80))
        kept.enter_context(pod.listen("127.0.0.1", 81))
        dual = kept.enter_context(pod.make(socket.AF_INET6))
        dual.bind(("::", 82))
        dual.listen()
        only = kept.enter_context(pod.make(socket.AF_INET6))
        only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only.bind(("::", 83))
        only.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        only.listen()
        for client, server, address in ((pod, host, HOST4), (host, pod, POD4), (pod, host, HOST6), (host, pod, POD6)):
            for end in stream(client, server, address, 7000):
                kept.enter_context(end)
        mapped = kept.enter_context(host.connect(POD4, 82))
        kept.enter_context(dual.accept()[0])
        near, far = stream(pod, host, HOST4, 7001)  # the pod half closed
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        far2, near2 = stream(host, pod, POD4, 7002)  # the peer half closed
        far2.shutdown(socket.SHUT_WR)
        assert near2.recv(1) == b""
        near3, far3 = stream(pod, host, HOST4, 7003)  # closed, the pod first
        near3.shutdown(socket.SHUT_WR)
        assert far3.recv(1) == b""
        far3.close()
        assert near3.recv(1) == b""
        near3.close()
        silent = kept.enter_context(pod.make())
        silent.setblocking(False)
        silent.connect_ex(("10.78.0.77", 1))  # nobody answers
        for end in (near, far, near2, far2):
            kept.enter_context(end)
        # The other end acknowledges a FIN when it likes.
        until(lambda: not diag.both((TcpState.FIN_WAIT1,)), "FINs are acknowledged")
        found = diag.both()
        assert {one.state for one in found} == set(SS.values())
        assert next(one for one in found if one.local == (POD4, 82)).remote == mapped.getsockname()
        assert order(found) == order(diag.sockets(4) + diag.sockets(6)) == order(seen_by_ss(nodes))
        assert {one.local[1]: one.v6_only for one in diag.both((TcpState.LISTEN,))} == {
            80: False, 81: False, 82: False, 83: True
        }  # fmt: skip
        assert [one.local[1] for one in found if one.of_ztunnel] == [83]
        assert {one.state for one in diag.both((TcpState.CLOSE_WAIT,))} == {TcpState.CLOSE_WAIT}
        for one in found:
            if one.state is not TcpState.LISTEN:
                assert diag.find(one.local, one.remote) == one


def test_find_is_exact(nodes: Pair, diag: SockDiag) -> None:
    near, far = stream(nodes.host, nodes.pod, POD4, 7000)
    with near, far, nodes.pod.listen("0.0.0.0", 7001), nodes.pod.listen("::", 7002):
        there = near.getsockname()
        found = diag.find((POD4, 7000), there)
        assert found is not None and found.state is TcpState.ESTABLISHED
        assert diag.find(there, (POD4, 7000)) is None
        assert diag.find((POD4, 7000), (there[0], there[1] - 1)) is None
        assert diag.find((POD4, 7001), there) is None  # where the kernel would name the listener
        assert diag.find((POD6, 7002), (HOST6, 9)) is None


def test_accept_queues_are_those_of_listeners_alone(nodes: Pair, diag: SockDiag) -> None:
    pod = nodes.pod
    with contextlib.ExitStack() as kept:
        first, mapped = kept.enter_context(pod.listen("0.0.0.0", 80)), kept.enter_context(pod.listen("::", 81))
        kept.enter_context(pod.listen(POD4, 83))  # not on loopback
        for _ in range(2):
            kept.enter_context(pod.connect("127.0.0.1", 80))
        kept.enter_context(nodes.host.connect(POD4, 81))
        kept.enter_context(mapped.accept()[0])
        found = {queue.port: queue for queue in diag.accept_queues((80, 81, 82, 83))}
        assert {port: queue.waiting for port, queue in found.items()} == {80: 2, 81: 0}
        listeners = {one.local[1]: one.cookie for one in diag.both((TcpState.LISTEN,))}
        assert {port: queue.cookie for port, queue in found.items()} == {port: listeners[port] for port in (80, 81)}
        kept.enter_context(first.accept()[0])
        assert [queue.waiting for queue in diag.accept_queues((80,))] == [1]
        assert diag.accept_queues(()) == []


def test_a_keepalive_timer_that_is_late_is_still_one(nodes: Pair, diag: SockDiag) -> None:
    """The kernel runs a timer of a second some jiffies late: it is due then."""
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    with near, far:
        ends = near.getsockname(), near.getpeername()
        assert diag.keepalive(*ends) == 0
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            near.setsockopt(socket.IPPROTO_TCP, option, 1)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found = [diag.keepalive(*ends)]
        while sum(later > earlier for earlier, later in itertools.pairwise(found)) < 3:  # it was set again
            found.append(diag.keepalive(*ends) or 0)
            assert len(found) < 1_000_000
        assert min(found) > 0


def test_a_socket_of_family_6_carries_ipv4_where_ipv6_is_switched_off(nodes: Pair, diag: SockDiag) -> None:
    """Why family 6 is asked for in such a namespace too."""
    run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1"], netns=nodes.pod.path)
    assert not nodes.target.has_ipv6()
    with nodes.pod.make(socket.AF_INET6) as listener:
        listener.bind(("::", 80))
        listener.listen()
        with nodes.host.connect(POD4, 80) as near, listener.accept()[0]:
            there = near.getsockname()
            assert [(one.local, one.remote) for one in diag.sockets(6, (TcpState.ESTABLISHED,))] == [
                ((POD4, 80), there)
            ]
            assert diag.sockets(4) == []
            found = diag.find((POD4, 80), there)
            assert found is not None and found.family == 6


def test_many_sockets_come_all_and_once(nodes: Pair, diag: SockDiag) -> None:
    with contextlib.ExitStack() as kept:
        listener = kept.enter_context(nodes.pod.listen("127.0.0.1", 80))
        ends = []
        for _ in range(900):
            near = kept.enter_context(nodes.pod.connect("127.0.0.1", 80))
            ends += [near, kept.enter_context(listener.accept()[0])]
        found = diag.both((TcpState.ESTABLISHED,))
        assert len({one.cookie for one in found}) == len(found) == 1800
        assert {(one.local, one.remote) for one in found} == {(end.getsockname(), end.getpeername()) for end in ends}
        by_kernel = {int.from_bytes(end.getsockopt(socket.SOL_SOCKET, 57, 8), "little") for end in ends}  # SO_COOKIE
        assert {one.cookie for one in found} == by_kernel


def test_an_orphan_keeps_its_cookie_to_the_end(nodes: Pair, diag: SockDiag) -> None:
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    cookie = int.from_bytes(near.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
    near.close()
    assert far.recv(1) == b""
    (one,) = until(lambda: diag.both((TcpState.FIN_WAIT2,)), "the FIN is acknowledged")
    assert (one.cookie, one.inode) == (cookie, 0)
    far.close()
    (one,) = until(lambda: diag.both((TcpState.TIME_WAIT,)), "the connection ends")
    assert one.cookie == cookie


def test_it_tells_of_the_namespace_it_was_made_in(nodes: Pair, diag: SockDiag) -> None:
    with nodes.host.listen("0.0.0.0", 80), contextlib.closing(nodes.host.call(SockDiag)) as other:
        assert diag.both() == []
        assert [one.local for one in other.both()] == [("0.0.0.0", 80)]
        assert re.match(r"0\.0\.0\.0:80 -> ", str(other.both()[0]))
