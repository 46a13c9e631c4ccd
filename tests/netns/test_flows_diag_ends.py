# SPDX-License-Identifier: Apache-2.0
"""Accounting without eBPF: connections that end by a reset, ports that are used again, and lost notifications."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from support.diag_account import IN, OUT, Watched, exempt, watched_pod
from support.node import until
from support.ztunnel import PEER4, POD4, abort

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.flows.inet_diag import collector as sockdiag
from agent.flows.record import Closer, Fate, How, Reason
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netlink.sock_events import SocketEvents

pytestmark = pytest.mark.root


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with watched_pod(tmp_path) as made:
        yield made


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
