# SPDX-License-Identifier: Apache-2.0
"""Connections that failed or had hardly begun: each has its cause, and none is taken for a leak."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.accounting import MODES, Account, accounted
from support.applications import RESETS, answer, cookie, dial, fails, receive, reset
from support.ebpf_pod import APP, FREE, PEER, Where, accepted, family
from support.fates import (
    EXCLUDED,
    OUT,
    TUNED,
    Served,
    fate,
    only,
    served,
)
from support.leaking import MARKED
from support.node import until

from agent.flows.record import Closer, Connection, Fate, How, Reason

pytestmark = pytest.mark.root


TCP_USER_TIMEOUT = 18  # linux/tcp.h


@pytest.fixture(params=MODES)
def account(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as made:
        yield made


def failing(
    account: Account, error: int, where: Where, kind: str = "IPv4", *options: tuple[int, int, int]
) -> Connection:
    number = account.application(lambda: fails(kind, where, error, options=options)).result()
    found = account.record(number)
    assert found.failed and (found.sent, found.received) == (0, 0) and found.closed is not None
    return found


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_refused(account: Served, kind: str) -> None:
    """By the peer: what was excluded, and what has leaked."""
    account.free.close()
    account.app.close()
    found = [failing(account, errno.ECONNREFUSED, (PEER[family(kind)], FREE), kind)]
    assert fate(found[0]) == EXCLUDED
    if account.mode != "ebpf":
        account.collector._pods.doubt()
        found.append(failing(account, errno.ECONNREFUSED, (PEER[family(kind)], APP), kind, MARKED))
        assert fate(found[1]) == (OUT, Fate.LEAKED, Reason.NONE)
    assert {(one.how, one.closer) for one in found} == {(How.REFUSED, Closer.REMOTE)}
    only(account, *map(fate, found))
    assert account.sums()["failed"] == len(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_without_a_ztunnel_nobody_knows(mode: str, kind: str) -> None:
    """It was not to leak, and has not."""
    with accounted(mode, ztunnel=False) as account:
        one = failing(account, errno.ECONNREFUSED, (PEER[family(kind)], APP), kind)
        assert (fate(one), one.how) == ((OUT, Fate.UNDECIDED, Reason.NONE), How.REFUSED)
        only(account, fate(one))


UNREACHABLE, SILENT = "10.98.0.1", "10.99.0.1"
QUICK = socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 100  # ms; looked at when the SYN is sent again


@pytest.fixture
def beyond(account: Served) -> Served:
    """The peer is a router, too: to where nobody is, and to where nobody answers."""
    account.peer.sh(
        "sysctl -qw net.ipv4.ip_forward=1; ip route add unreachable 10.98.0.0/16; ip route add blackhole 10.99.0.0/16"
    )
    return account


def wanted(account: Served, leaks: bool) -> None:
    """Connections to there are excluded; or they leak, without rules."""
    if leaks:
        account.settle(None)
        return
    networks = (*TUNED.exclude.outbound_networks, "10.98.0.0/15")
    account.capture(replace(TUNED, exclude=replace(TUNED.exclude, outbound_networks=networks)))


ENDS = [
    (errno.EHOSTUNREACH, UNREACHABLE, How.UNREACHABLE, Closer.NONE),
    (errno.ETIMEDOUT, SILENT, How.TIMEOUT, Closer.NONE),
]


@pytest.mark.parametrize(("error", "host", "how", "closer"), ENDS, ids=["unreachable", "timeout"])
@pytest.mark.parametrize("leaks", [False, True], ids=["excluded", "leaked"])
def test_nobody_there(beyond: Served, leaks: bool, error: int, host: str, how: How, closer: Closer) -> None:
    wanted(beyond, leaks)
    one = failing(beyond, error, (host, APP), "IPv4", QUICK)
    assert (one.how, one.closer, one.remote) == (how, closer, (host, APP))
    watched = beyond.mode != "ebpf"  # by eBPF nobody watches what leaves: the capture's own guard drops it
    leaked = OUT, Fate.LEAKED if watched else Fate.UNDECIDED, Reason.NONE
    assert fate(one) == (leaked if leaks else (OUT, Fate.EXEMPT, Reason.EXCLUDED_NETWORK))
    only(beyond, fate(one))


def test_given_up_while_connecting(beyond: Served) -> None:
    wanted(beyond, False)

    def app() -> int:
        sock = socket.socket()
        sock.setblocking(False)
        assert sock.connect_ex((SILENT, APP)) == errno.EINPROGRESS
        number = cookie(sock)
        sock.close()
        return number

    one = beyond.record(beyond.application(app).result())
    assert (one.how, one.closer, one.failed) == (How.ABORTED, Closer.LOCAL, True)
    only(beyond, fate(one))


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_a_socket_bound_to_an_interface_is_captured(account: Served, kind: str) -> None:
    def app() -> int:
        with socket.socket(socket.AF_INET if kind == "IPv4" else socket.AF_INET6) as sock:
            sock.setsockopt(*QUICK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
            sock.connect((PEER[family(kind)], APP))
            return cookie(sock)

    one = account.record(account.application(app).result())
    assert one.fate is Fate.CAPTURED
    only(account, fate(one))


def test_what_ztunnel_has_not_taken_yet_does_not_leak(account: Served) -> None:
    """Established to the application, while ztunnel's end is not made: its queue is full, or it waits for data."""
    account.ztunnel.outbound.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
    wait, go = os.pipe()

    def app() -> tuple[int, int]:
        sock, gone = (dial("IPv4", (PEER[4], APP)) for _ in range(2))
        numbers = cookie(sock), cookie(gone)
        os.read(wait, 1)
        reset(gone)
        sock.sendall(b"x" * 100)
        receive(sock, 50)
        sock.close()
        return numbers

    child = account.application(app, keep=(wait,))
    until(lambda: len(account.collector.live()) == 2, "both are established")
    opened = account.collector.live()[0].opened
    until(lambda: time.time() - opened > 1.5, "more than a moment is over")
    assert not +account.sums(direction=OUT)
    assert {one.fate for one in account.collector.live()} == {Fate.UNDECIDED}
    os.write(go, b"x")
    answer(accepted(account.ztunnel.outbound))
    records, numbers = account.records(2), child.result()
    fates = {one.socket: fate(one) for one in records}
    assert fates == dict(
        zip(numbers, [(OUT, Fate.CAPTURED, Reason.NONE), (OUT, Fate.UNDECIDED, Reason.NONE)], strict=True)
    )
    only(account, *fates.values())


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_gone_before_ztunnels_end_is_made(account: Served, kind: str) -> None:
    """lo is so slow that the last ACK of the handshake arrives when the application has reset and gone."""
    account.pod.sh("tc qdisc add dev lo root tbf rate 16kbit burst 100 limit 10000")

    def app() -> int:
        with dial(kind, (PEER[family(kind)], APP)) as sock:
            number = cookie(sock)
            reset(sock)
        return number

    number = account.application(app).result()
    with account.ztunnel.outbound.accept()[0]:
        one = account.record(number)
    assert (fate(one), one.how, one.closer) == ((OUT, Fate.CAPTURED, Reason.NONE), How.RESET, Closer.LOCAL)
    only(account, fate(one))


def resets(kind: str, where: Where, count: int) -> None:
    """Connects, and is gone in that very moment; now on this CPU and now on another one."""
    cpus = sorted(os.sched_getaffinity(0))
    for number in range(count):
        with socket.socket(socket.AF_INET if kind == "IPv4" else socket.AF_INET6) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
            if number % 3 == 0:
                os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            sock.connect(where)
            if number % 3 == 1:
                os.sched_setaffinity(0, {cpus[(number + 1) % len(cpus)]})


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_reset_in_the_moment_of_connecting(account: Served, kind: str) -> None:
    """Never leaked, whatever comes first: both ends' beginnings, and the end, may be on CPUs of their own."""
    workers, each, taken, stop = 4, 1500, Counter[str](), threading.Event()
    account.ztunnel.outbound.settimeout(0.1)

    def accept() -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                account.ztunnel.outbound.accept()[0].close()
                taken["all"] += 1
                continue
            if stop.is_set():
                return

    children = [account.application(lambda: resets(kind, (PEER[family(kind)], APP), each)) for _ in range(workers)]
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with account.refreshing():
            for child in children:
                child.result()
            found = account.records(workers * each)
    finally:
        stop.set()
        thread.join()
    fates = Counter(map(fate, found))
    assert {(one.how, one.closer) for one in found} == {(How.RESET, Closer.LOCAL)}
    # One in a hundred thousand comes to ztunnel's end after its own reset, which has gone over another CPU.
    assert fates == +Counter(
        {
            (OUT, Fate.CAPTURED, Reason.NONE): taken["all"],
            (OUT, Fate.UNDECIDED, Reason.NONE): workers * each - taken["all"],
        }
    )
    assert taken["all"] >= workers * each - 10
    only(account, *fates.elements())
