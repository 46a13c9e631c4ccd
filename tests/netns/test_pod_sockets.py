# SPDX-License-Identifier: Apache-2.0
"""A pod's sockets by state and its ephemeral ports, against what was opened."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node import until
from support.pair import HOST4, HOST6, POD4, Pair, pair, stream

from agent.core.model.sockets import TcpState
from agent.flows.inet_diag.socket_counts import PodSockets, SocketCounts
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag

pytestmark = pytest.mark.root


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        run(["sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40999"], netns=made.pod.path)
        yield made


@pytest.fixture
def counts() -> Iterator[SocketCounts]:
    made = SocketCounts()
    yield made
    made.close()


def when(nodes: Pair, counts: SocketCounts, states: dict[TcpState, int]) -> PodSockets:
    """FINs take a moment."""
    until(lambda: counts.read(nodes.target).states == states, f"{states}")
    return counts.read(nodes.target)


def test_states_and_ports(nodes: Pair, counts: SocketCounts) -> None:
    pod, host = nodes.pod, nodes.host
    empty = counts.read(nodes.target)
    assert (dict(empty.states), empty.ephemeral.size, empty.ephemeral.remote) == ({}, 1000, None)
    with contextlib.ExitStack() as kept:
        kept.enter_context(pod.listen("0.0.0.0", 80))
        busy, other = kept.enter_context(host.listen(HOST4, 7000)), kept.enter_context(host.listen(HOST6, 7001))
        for number in range(30):  # closed here first: their timers stay
            near = pod.connect(HOST4, 7000)
            far, _ = busy.accept()
            near.close()
            far.close()
            if number < 5:
                kept.enter_context(pod.connect(HOST6, 7001))
                kept.enter_context(other.accept()[0])
        half = kept.enter_context(pod.connect(HOST4, 7000))
        busy.accept()[0].close()  # closed there, not here
        for end in stream(host, pod, POD4, 7002):  # accepted, from a port that is not ours
            kept.enter_context(end)
        found = when(nodes, counts, {
            TcpState.LISTEN: 1, TcpState.TIME_WAIT: 30, TcpState.ESTABLISHED: 6, TcpState.CLOSE_WAIT: 1,
        })  # fmt: skip
        ports = found.ephemeral
        assert (ports.first, ports.last, ports.towards, ports.remote) == (40000, 40999, 31, (HOST4, 7000))
        assert 31 <= ports.used <= 36  # a port may serve two peers
        assert half.getsockname()[1] in range(ports.first, ports.last + 1)


def test_all_are_counted_when_ports_run_out(nodes: Pair, counts: SocketCounts) -> None:
    run(["sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40099"], netns=nodes.pod.path)
    with nodes.host.listen(HOST4, 7000), contextlib.ExitStack() as kept:
        for _ in range(100):
            kept.enter_context(nodes.pod.connect(HOST4, 7000))
        with pytest.raises(OSError, match="assign"):
            nodes.pod.connect(HOST4, 7000)
        found = counts.read(nodes.target).ephemeral
        assert (found.used, found.towards, found.size) == (100, 100, 100)


def test_rows_are_those_of_the_slow_dump(nodes: Pair) -> None:
    """Messages of several lengths in one datagram, and many datagrams."""
    with contextlib.ExitStack() as kept, contextlib.closing(nodes.target.netns.call(SockDiag)) as diag:
        v4, v6 = kept.enter_context(nodes.host.listen(HOST4, 7000)), kept.enter_context(nodes.host.listen(HOST6, 7000))
        for number in range(400):
            listener, address = (v4, HOST4) if number % 3 else (v6, HOST6)
            near = nodes.pod.connect(address, 7000)
            far, _ = listener.accept()
            if number % 2:
                kept.enter_context(near)
                kept.enter_context(far)
            else:
                near.close()
                far.close()
        until(lambda: not diag.both((TcpState.FIN_WAIT1, TcpState.FIN_WAIT2)), "all FINs are there")
        rows = sorted((row[1], socket.ntohs(row[2]), socket.ntohs(row[3])) for row in diag.rows())
        assert rows == sorted((one.state, one.local[1], one.remote[1]) for one in diag.both())
        assert len(rows) == 400 and len({state for state, _, _ in rows}) == 2


def test_one_descriptor_for_each_pod(nodes: Pair, counts: SocketCounts) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        counts.read(nodes.target)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    counts.release(nodes.target.netns.id.cookie)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
