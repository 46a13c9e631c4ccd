# SPDX-License-Identifier: Apache-2.0
"""What becomes of every connection is told: captured, or exempt, and why."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from support.accounting import MODES, accounted
from support.applications import answer, answers, asks, cookie, dial, receive, reset
from support.ebpf_pod import APP, CAPTURE, DNS, FREE, KINDS, PEER, POD, accepted, family
from support.fates import IN, OPEN, OUT, PORT, USER, Served, fate, from_outside, inward, only, outward, served, told

from agent.core.model.redirect import Redirect
from agent.core.names import HBONE_PORT, PROBE_IPV4, PROBE_IPV6, ZTUNNEL_MARK
from agent.flows.record import Fate, Reason
from agent.lab.links import links

pytestmark = pytest.mark.root
OTHER = {4: "10.77.0.9", 6: "fd77::9"}
PROBE = {4: PROBE_IPV4, 6: PROBE_IPV6}


@pytest.fixture(params=MODES)
def account(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as made:
        yield made


# --- captured


@pytest.mark.parametrize("kind", KINDS)
def test_captured_both_ways(account: Served, kind: str) -> None:
    version = family(kind)
    out = outward(account, account.ztunnel.outbound, kind, (PEER[version], APP))
    assert fate(out) == (OUT, Fate.CAPTURED, Reason.NONE)
    assert (out.remote, out.local[0]) == ((PEER[version], APP), POD[version])
    assert (out.user, out.command, out.process > 0, out.established) == (0, "python", True, True)
    if kind != "mapped":
        into = inward(account, lambda: account.relay(kind, (POD[version], PORT)))
        assert fate(into) == (IN, Fate.CAPTURED, Reason.NONE)
        assert (into.local, into.remote[0]) == ((POD[version], PORT), PEER[version])
        only(account, fate(out), fate(into))
        assert account.sums(reason=Reason.ZTUNNEL, direction=OUT)["opened"] == 1
    else:
        only(account, fate(out))


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_dns_over_tcp_is_captured(account: Served, kind: str) -> None:
    one = outward(account, account.ztunnel.dns_tcp, kind, (PEER[family(kind)], DNS))
    assert (one.remote, fate(one)) == ((PEER[family(kind)], DNS), (OUT, Fate.CAPTURED, Reason.NONE))
    only(account, fate(one))


# --- exempt


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_what_is_excluded_outbound(account: Served, kind: str) -> None:
    version = family(kind)
    excluded = [
        outward(account, account.free, kind, (PEER[version], FREE)),
        outward(account, account.app, kind, (OTHER[version], APP)),
    ]

    def as_user() -> int:
        os.setuid(USER)
        return asks(kind, (PEER[version], APP))

    child = account.application(as_user)
    answer(accepted(account.app))
    excluded.append(told(account, child.result(), user=USER, sent=100, received=50))
    reasons = (Reason.EXCLUDED_PORT, Reason.EXCLUDED_NETWORK, Reason.EXCLUDED_USER)
    assert [fate(one) for one in excluded] == [(OUT, Fate.EXEMPT, reason) for reason in reasons]
    only(account, *(fate(one) for one in excluded))


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_what_is_excluded_inbound(account: Served, kind: str) -> None:
    version = family(kind)

    def from_peer(source: str, port: int) -> Callable[[], socket.socket]:
        def connect() -> socket.socket:
            made = account.peer.make(kind)
            made.bind((source, 0))
            made.connect((POD[version], port))
            return made

        return connect

    port = inward(account, from_peer(PEER[version], OPEN), OPEN)
    network = inward(account, from_peer(OTHER[version], PORT))
    assert fate(port) == (IN, Fate.EXEMPT, Reason.EXCLUDED_PORT)
    assert fate(network) == (IN, Fate.EXEMPT, Reason.EXCLUDED_NETWORK)
    only(account, fate(port), fate(network))


@pytest.mark.parametrize(("kind", "host"), [("IPv4", "127.0.0.1"), ("IPv4", POD[4]), ("IPv6", "::1"), ("IPv6", POD[6])])
def test_within_the_pod(account: Served, kind: str, host: str) -> None:
    """Both ends are applications': two records."""
    child = account.serving(answers, port=PORT)
    client = account.application(lambda: asks(kind, (host, PORT)))
    there, back = told(account, client.result(), sent=100), told(account, child.result(), sent=50)
    assert fate(there) == (OUT, Fate.EXEMPT, Reason.LOOPBACK) and fate(back) == (IN, Fate.EXEMPT, Reason.LOOPBACK)
    only(account, fate(there), fate(back))


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_probes_both_ways(account: Served, kind: str) -> None:
    version = family(kind)
    size = 32 if version == 4 else 128
    with links(account.peer.name) as peer, links(account.pod.name) as pod:
        peer.add_addresses("eth0", f"{PROBE[version]}/{size}")
        pod.rtnl.route("add", dst=f"{PROBE[version]}/{size}", oif=pod.index("eth0"))

    def probe() -> socket.socket:
        made = account.peer.make(kind)
        made.bind((PROBE[version], 0))
        made.connect((POD[version], PORT))
        return made

    into = inward(account, probe)
    out = outward(account, account.app, kind, (PROBE[version], APP))
    assert [fate(into), fate(out)] == [(IN, Fate.EXEMPT, Reason.PROBE), (OUT, Fate.EXEMPT, Reason.PROBE)]
    only(account, fate(into), fate(out))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("want", "into", "out"),
    [
        (Redirect(ipv6=False), Reason.FAMILY, Reason.FAMILY),
        (Redirect(ingress_only=True), Reason.INGRESS_ONLY, None),
    ],
    ids=["family", "ingress-only"],
)
def test_what_is_not_captured_at_all(mode: str, want: Redirect, into: Reason, out: Reason | None) -> None:
    with accounted(mode, want) as account:
        with account.peer.listen(APP) as app:
            found = [inward(account, lambda: from_outside(account, "IPv6"))]
            assert fate(found[0]) == (IN, Fate.EXEMPT, into)
            if out:
                found.append(outward(account, app, "IPv6", (PEER[6], APP)))
                assert fate(found[1]) == (OUT, Fate.EXEMPT, out)
            found.append(outward(account, account.ztunnel.outbound, "IPv4", (PEER[4], APP)))
            assert fate(found[-1]) == (OUT, Fate.CAPTURED, Reason.NONE)
        only(account, *map(fate, found))


@pytest.mark.parametrize("mode", MODES)
def test_what_came_before_the_rules(mode: str) -> None:
    """It stays so when they come, and what comes then is captured."""
    with accounted(mode, captured=False) as account, account.peer.listen(APP) as app:
        account.collector.enrol(account.pod.target, CAPTURE, captured=False)
        early = [outward(account, app, "IPv4", (PEER[4], APP)), inward(account, lambda: from_outside(account, "IPv4"))]
        assert [fate(one) for one in early] == [(OUT, Fate.EXEMPT, Reason.BEFORE), (IN, Fate.EXEMPT, Reason.BEFORE)]
        wait, go = os.pipe()

        def held() -> int:
            sock = dial("IPv4", (PEER[4], APP))
            number = cookie(sock)
            sock.sendall(b"x" * 100)
            assert receive(sock, 50) == 50
            os.read(wait, 1)
            sock.close()
            return number

        child = account.application(held, keep=(wait,))
        other = accepted(app)
        assert receive(other, 100) == 100
        other.sendall(b"y" * 50)
        assert account.sums(reason=Reason.BEFORE)["opened"] >= 2
        account.capture()
        os.write(go, b"x")
        reset(other)
        late = told(account, child.result(), received=50)
        assert fate(late) == (OUT, Fate.EXEMPT, Reason.BEFORE)
        then = outward(account, account.ztunnel.outbound, "IPv4", (PEER[4], APP))
        assert fate(then) == (OUT, Fate.CAPTURED, Reason.NONE)
        only(account, *map(fate, (*early, late, then)))


def test_what_ztunnel_opens_is_counted_and_no_record(account: Served) -> None:
    with account.pod.make("IPv4") as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        own.connect((PEER[4], APP))
        with accepted(account.app):
            pass
    with account.pod.listen(HBONE_PORT, mark=ZTUNNEL_MARK), from_outside(account, "IPv4", HBONE_PORT):
        pass
    assert account.sums(reason=Reason.ZTUNNEL, direction=OUT, fate=Fate.EXEMPT)["opened"] == 1
    assert account.sums(reason=Reason.ZTUNNEL, direction=IN, fate=Fate.EXEMPT)["opened"] == 1
    assert {(one.remote, one.port) for one in account.deltas} == {("", 0)}
    only(account)
