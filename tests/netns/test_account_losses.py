# SPDX-License-Identifier: Apache-2.0
"""What cannot be told is counted, the rest is told: full maps, programs taken away, agents that come and go."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import pytest
from support.accounting import Account, accounted
from support.applications import RESETS, cookie, dial, receive
from support.ebpf_pod import APP, CAPTURE, FREE, PEER, accepted, waiting
from support.node import until

from agent.backends.ebpf.pins import Pins
from agent.flows.ebpf import account_abi
from agent.flows.ebpf.account_abi import Share, Shared
from agent.flows.record import Direction, Fate, Reason
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run

pytestmark = pytest.mark.root
OUT = Direction.OUTBOUND
STRIDE = account_abi.RECORD.size + 8


@pytest.fixture(params=["nftables", "ebpf"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def talk(account: Account, count: int, *, bytes_each: int = 10) -> Iterator[int]:
    """Captured connections, one after the other, each of a port of its own; their sockets."""

    def app() -> list[int]:
        numbers = []
        for number in range(count):
            with dial("IPv4", (PEER[4], 1000 + number)) as sock:
                numbers.append(cookie(sock))
                sock.sendall(bytes(bytes_each))
                assert receive(sock, 1 << 20) == 2 * bytes_each
        return numbers

    child = account.application(app)
    for _ in range(count):
        with accepted(account.ztunnel.outbound) as sock:
            assert receive(sock, bytes_each) == bytes_each
            sock.sendall(bytes(2 * bytes_each))
    return iter(child.result())


def totals(count: int, bytes_each: int = 10) -> Counter[str]:
    return Counter(opened=count, closed=count, sent=count * bytes_each, received=2 * count * bytes_each, failed=0)


def test_what_a_full_ring_has_no_room_for_is_counted(mode: str) -> None:
    with accounted(mode, sizes={"records": 4096}) as account:
        fits = 4095 // STRIDE
        talk(account, 60)
        assert account.collector.losses()["record"] == 60 - fits
        assert len(account.read()) == fits
        assert account.sums(direction=OUT) == totals(60), "totals do not depend on records"
        talk(account, 5)
        assert len(account.read()) == fits + 5
        assert account.collector.losses()["record"] == 60 - fits


def test_more_peers_than_the_map_has_room_for(mode: str) -> None:
    """The rest is counted together, and that it was."""
    with accounted(mode, sizes={"tallies": 8}) as account:
        numbers = set(talk(account, 30))
        assert {one.socket for one in account.records(30)} == numbers
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(30)
        named = {(one.remote, one.port) for one in account.deltas if one.reason is not Reason.ZTUNNEL}
        assert len(named) == 9 and ("", 0) in named
        assert account.collector.losses()["peer"] >= 22
        assert account.sums(direction=OUT, fate=Fate.CAPTURED, port=0)["closed"] == 22


def test_whether_ztunnel_took_it_may_be_lost(mode: str) -> None:
    """They are undecided then, not leaked; and their bytes are told."""
    with accounted(mode, sizes={"begun": 4}) as account:
        children = [account.application(lambda: stays(20)) for _ in range(1)]
        held = [accepted(account.ztunnel.outbound) for _ in range(20)]
        for one in held:
            assert one.recv(5) == b"hello"
        lost = account.collector.losses()["fate"]
        assert 0 < lost <= 16
        fates = Counter(one.fate for one in account.collector.live())
        assert fates == {Fate.CAPTURED: 20 - lost, Fate.UNDECIDED: lost}
        account.refresh()
        for one in held:
            one.close()
        children[0].result()
        account.records(20)
        for fate, count in fates.items():
            counted = account.sums(direction=OUT, fate=fate)
            assert (counted["opened"], counted["closed"], counted["sent"]) == (count, count, 5 * count)
        assert account.sums(fate=Fate.LEAKED)["opened"] == 0
        assert Counter(one.fate for one in account.told) == fates


def allowed(account: Account, of: Shared, most: int) -> None:
    account.maps["shares"].update(account_abi.share_key(0, of), Share(most).encode())


def test_a_pod_takes_no_more_than_its_share_of_the_peers_and_is_named() -> None:
    with accounted("nftables") as account:
        allowed(account, Shared.PEERS, 5)
        talk(account, 30)
        account.records(30)
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(30), "nothing is lost but addresses"
        assert account.sums(direction=OUT, fate=Fate.CAPTURED, port=0)["closed"] == 25
        ((pod, words),) = account.collector.crowded()
        assert pod == account.pod.target.netns.id.cookie and "may have (5): 25 connections" in words
        assert not account.collector.crowded(), "once a minute"


def test_a_pod_takes_no_more_than_its_share_of_the_handshakes_and_gives_it_back() -> None:
    with accounted("nftables") as account:
        allowed(account, Shared.HANDSHAKES, 4)
        child = account.application(lambda: stays(20))
        held = [accepted(account.ztunnel.outbound) for _ in range(20)]
        for one in held:
            assert one.recv(5) == b"hello"
        assert account.collector.losses()["fate"] > 0
        for one in held:
            one.close()
        child.result()
        account.records(20)
        ((pod, words),) = account.collector.crowded()
        assert pod == account.pod.target.netns.id.cookie and "wait for ztunnel" in words
        key = account_abi.share_key(pod, Shared.HANDSHAKES)
        assert account_abi.share(account.maps["shares"].lookup(key) or b"").taken == 0
        account.collector.sweep(lambda cookies: cookies)
        assert account.maps["shares"].lookup(key) is None, "a pod that is gone is forgotten"


def stays(count: int) -> None:
    socks = [dial("IPv4", (PEER[4], APP)) for _ in range(count)]
    for one in socks:
        one.sendall(b"hello")
    for one in socks:
        assert receive(one, 1) == 0
        one.close()


def test_the_histograms_of_a_pod_that_has_gone_make_room(mode: str) -> None:
    with accounted(mode) as account:
        list(talk(account, 5))
        account.records(5)
        account.refresh()
        assert sum(sum(one.duration) for one in account.qualities) == 5
        assert not account.maps["qualities"].is_empty()
        account.collector.release(account.pod.cookie)
        for _ in range(2):  # the first one takes what has ended meanwhile
            account.refresh()
        assert account.maps["qualities"].is_empty()


def test_a_pod_is_released_and_enrolled_again(mode: str) -> None:
    """Of what lived meanwhile everything is told; what was begun meanwhile is not of our pods."""
    with accounted(mode) as account:
        child = account.application(lambda: stays(1))
        held = accepted(account.ztunnel.outbound)
        assert held.recv(5) == b"hello"
        account.collector.release(account.pod.cookie)
        assert account.pod.cookie not in account.collector._pods.cookies()
        talk(account, 3)
        account.known()
        talk(account, 2)
        held.close()
        child.result()
        assert len(account.records(3)) == 3
        counted = account.sums(direction=OUT, fate=Fate.CAPTURED)
        assert counted == totals(2) + Counter(opened=1, closed=1, sent=5) + Counter(failed=0)
        assert account.losses() == 0


@pytest.mark.parametrize("what", ["link", "programs", "everything but maps"])
def test_programs_that_were_taken_away_come_back(mode: str, what: str) -> None:
    with accounted(mode) as account:
        child = account.application(lambda: stays(1))
        held = accepted(account.ztunnel.outbound)
        assert held.recv(5) == b"hello"
        talk(account, 2)
        place = account.pins.node
        if what == "link":
            run(["bpftool", "link", "detach", "pinned", str(place.link("account"))])
        if what != "programs":
            bpffs.remove_tree(place.link("account"))
        if what != "link":
            bpffs.remove_tree(place.path / "programs")
        wrong = account.collector.verify()
        assert wrong and account.collector.verify() == ()
        talk(account, 3)
        held.close()
        child.result()
        account.records(6)
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(5) + Counter(opened=1, closed=1, sent=5)
        assert account.losses() == 0


def test_what_ends_while_no_program_looks(mode: str) -> None:
    """Not told as an end; but what was told of it until then stays, and no later connection is counted for it."""
    with accounted(mode) as account:
        child = account.application(lambda: stays(1))
        held = accepted(account.ztunnel.outbound)
        assert held.recv(5) == b"hello"
        assert account.sums(direction=OUT, fate=Fate.CAPTURED)["opened"] == 1
        run(["bpftool", "link", "detach", "pinned", str(account.pins.node.link("account"))])
        held.close()
        child.result()
        account.collector.verify()
        talk(account, 2)
        account.records(2)
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(2) + Counter(opened=1, sent=5)


def test_an_agent_goes_on_where_the_last_one_ended(mode: str) -> None:
    """What ended between the two is told, by the second; what the first has told is not told once more."""
    with accounted(mode) as account:
        talk(account, 3)
        assert account.sums(direction=OUT) == totals(3)
        account.records(3)
        child = account.application(lambda: stays(1))
        held = accepted(account.ztunnel.outbound)
        assert held.recv(5) == b"hello"
        account.collector.close()
        talk(account, 4)
        account.collector = account.another()
        account.known()
        talk(account, 5)
        held.close()
        child.result()
        account.records(3 + 4 + 5 + 1)
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(12) + Counter(opened=1, closed=1, sent=5)
        assert sum(account.collector.totals().values()) >= 13
        assert account.losses() == 0


def test_two_nodes_on_one_kernel_count_once_each(mode: str) -> None:
    """Both nodes' programs run for every socket there is; the one that knows the pod counts it, once."""
    with accounted(mode) as account:
        other = account.another(Pins.of(str(account.node.directory / "another")))
        account.made.callback(lambda: bpffs.remove_tree(other.programs.pins.root))
        other.refresh()
        talk(account, 5)
        assert len(account.records(5)) == 5 and not other.records()
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(5)
        assert other.refresh() == ([], []) and not other.live()
        other.admit()
        account.capture(collector=other)
        talk(account, 4)
        assert len(account.records(9)) == 9 and len(other.records()) == 4
        deltas, _ = other.refresh()
        assert sum(one.closed for one in deltas) == 4
        assert account.sums(direction=OUT, fate=Fate.CAPTURED) == totals(9)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_short_connections_and_somebody_reads_now_and_then(mode: str) -> None:
    """Each is told, or counted as lost, with a ring that is much too small for the pace."""
    with accounted(mode, sizes={"records": 16384}) as account:
        count, workers = 8000, 2

        def app() -> None:
            for _ in range(count // workers):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
                    sock.connect((PEER[4], FREE))

        free = account.peer.listen(FREE)
        account.made.callback(free.close)
        children = [account.application(app) for _ in range(workers)]
        taken = 0
        while taken < count:
            taken += waiting(free) and bool(free.accept()[0].close() or True)
            if taken % 1000 == 0:
                account.read()
        for child in children:
            child.result()
        lost = until(lambda: len(account.read()) + account.losses() == count and account.losses(), "all are there")
        assert 0 < lost < count
        assert account.sums(direction=OUT)["closed"] == count
        assert {one.reason for one in account.told} == {Reason.EXCLUDED_PORT} and account.want == CAPTURE
