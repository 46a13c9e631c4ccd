# SPDX-License-Identifier: Apache-2.0
"""Connections from before a pod's enrolment: found, survive the rules, and are gone from the list when they end.

The rules here are a short form of docs/design/rules.md: redirection, and before it the rule that lets packets pass
which do not open a connection (preserve).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from support.istio import route_marked
from support.node import until
from support.pair import HOST4, HOST6, POD4, POD6, Pair, carries, pair, rules, stream
from support.ztunnel import SECONDS

from agent.core.model.preexisting import report
from agent.core.model.sockets import OPENING, TcpSocket, TcpState
from agent.sources.preexisting_connections import PreexistingConnections

pytestmark = pytest.mark.root
PRESERVE = "tcp flags & (fin|syn|rst|ack) != syn accept"


DEAF = """
table inet deaf {
  chain input { type filter hook input priority 0; meta l4proto tcp drop; }
}"""
HELD = """
table inet held {
  chain output { type filter hook output priority 0; tcp flags & (syn|ack) == syn drop; }
}"""
MUTE = """
table inet mute {
  chain output { type filter hook output priority 0; tcp flags & (syn|ack) == ack drop; }
}"""
# One SYN leaves the pod, is not repeated, and the answer to it is lost.
LATE = """
table inet late {
  set gone { type inet_service; flags dynamic; }
  chain output { type filter hook output priority -400; tcp flags & (syn|ack) == syn jump once; }
  chain once { tcp dport @gone drop; add @gone { tcp dport }; }
  chain prerouting { type filter hook prerouting priority -400; tcp flags & (syn|ack) == syn|ack drop; }
}"""


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture
def connections() -> Iterator[PreexistingConnections]:
    made = PreexistingConnections()
    yield made
    made.close()


def redirect(nodes: Pair, first: str = "") -> None:
    # Replaced in one transaction, as the agent does it.
    rules(nodes.pod, f"""
table inet test {{}}
delete table inet test
table inet test {{
  chain prerouting {{
    type nat hook prerouting priority -100; {first}
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15006
    meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15006
  }}
  chain output {{
    type nat hook output priority -100; {first}
    oifname "lo" accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15001
  }}
}}""")  # fmt: skip


def names(sockets: tuple[TcpSocket, ...]) -> set[tuple[object, object]]:
    return {(one.local, one.remote) for one in sockets}


def ends(connection: socket.socket) -> tuple[object, object]:
    return connection.getsockname()[:2], connection.getpeername()[:2]


@contextlib.contextmanager
def captured(nodes: Pair) -> Iterator[None]:
    """Connections in both directions through somebody who stands where ztunnel does, awaited to be so."""
    pod, host = nodes.pod, nodes.host
    with contextlib.ExitStack() as kept:
        outbound, inbound = (kept.enter_context(pod.make()) for _ in range(2))
        for listener, port in ((outbound, 15001), (inbound, 15006)):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
            listener.bind(("0.0.0.0", port))
            listener.listen()
        kept.enter_context(pod.connect(HOST4, 9999))
        out, _ = outbound.accept()
        kept.enter_context(out)
        app = kept.enter_context(pod.listen("0.0.0.0", 8088))
        kept.enter_context(host.connect(POD4, 8088))
        client, (_, port) = inbound.accept()
        kept.enter_context(client)
        onward = kept.enter_context(pod.make())  # with the client's address, as ztunnel speaks to the application
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        onward.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        onward.bind((HOST4, port - 20000))
        onward.setblocking(False)
        onward.connect_ex((POD4, 8088))
        accepted, _ = app.accept()
        kept.enter_context(accepted)
        yield


MANGLE = """
table inet mangle {
  chain prerouting { type filter hook prerouting priority -150; meta mark & 0xfff == 0x539 ct mark set 0x111; }
  chain output { type route hook output priority -150; ct mark & 0xfff == 0x111 meta mark set ct mark; }
}"""


@pytest.mark.parametrize(("pod", "host"), [(POD4, HOST4), (POD6, HOST6)], ids=["ipv4", "ipv6"])
def test_p55_a_stream_survives_enrolment_both_ways_and_the_list_knows_it(
    nodes: Pair, connections: PreexistingConnections, pod: str, host: str
) -> None:
    out = stream(nodes.pod, nodes.host, host, 7000)
    back = stream(nodes.host, nodes.pod, pod, 7001)
    with contextlib.ExitStack() as kept:
        for end in (*out, *back):
            kept.enter_context(end)
        kept.enter_context(nodes.pod.listen(pod, 80))
        inner = kept.enter_context(nodes.pod.connect(pod, 80))  # with itself
        connections.begin("uid", nodes.target)
        redirect(nodes, PRESERVE)
        found = connections.applied("uid", nodes.target)
        assert names(found) == {ends(out[0]), ends(back[1])}
        assert ends(inner) not in names(found)
        assert carries(*out) and carries(*back)
        # What is new is refused, for nobody is on 15001 and 15006: the rules do redirect.
        with nodes.host.listen(host, 7002), pytest.raises(ConnectionRefusedError):
            nodes.pod.connect(host, 7002)
        with nodes.pod.listen(pod, 7003), pytest.raises(ConnectionRefusedError):
            nodes.host.connect(pod, 7003)
        assert names(connections.remaining("uid", nodes.target)) == {ends(out[0]), ends(back[1])}
        line = report(connections.remaining("uid", nodes.target))
        assert line.startswith("2 connections from before the enrolment are still outside: ")
        # One end after the other; the strict rules come when nothing is left.
        back[0].close()
        assert back[1].recv(1) == b""
        back[1].close()
        until(lambda: names(connections.remaining("uid", nodes.target)) == {ends(out[0])}, "the closed one is gone")
        out[1].close()
        assert out[0].recv(1) == b""
        out[0].close()
        until(lambda: not connections.remaining("uid", nodes.target), "all are gone")
        assert connections.as_note("uid") == []


@pytest.mark.parametrize("client_speaks", [True, False])
@pytest.mark.parametrize("of_pod", [True, False], ids=["pod is client", "pod is server"])
def test_without_the_rule_the_same_streams_break(nodes: Pair, of_pod: bool, client_speaks: bool) -> None:
    """So that the test above can fail."""
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000) if of_pod else stream(nodes.host, nodes.pod, POD4, 7001)
    with near, far:
        assert carries(near, far)  # nothing is in conntrack yet
        redirect(nodes)
        speaker = near if client_speaks else far
        speaker.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            speaker.recv(1)


def test_strict_rules_leave_alone_what_was_seen_while_they_were_lenient(nodes: Pair) -> None:
    """conntrack then knows the connection: only one that never spoke would be lost."""
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    with near, far:
        redirect(nodes, PRESERVE)
        assert carries(near, far)
        redirect(nodes)
        assert carries(near, far)


def test_captured_connections_are_not_outside(nodes: Pair, connections: PreexistingConnections) -> None:
    """Those that ztunnel holds already when the list is taken, and its own."""
    route_marked(nodes.pod.name)
    old = stream(nodes.pod, nodes.host, HOST4, 7000)
    with old[0], old[1]:
        connections.begin("uid", nodes.target)
        rules(nodes.pod, MANGLE)
        redirect(nodes, PRESERVE)
        with captured(nodes):
            assert names(connections.applied("uid", nodes.target)) == {ends(old[0])}
            again = PreexistingConnections()  # enrolled anew, with everything under way
            again.begin("uid", nodes.target)
            assert names(again.applied("uid", nodes.target)) == {ends(old[0])}
            again.close()


def test_what_slips_in_before_the_rules_counts(nodes: Pair, connections: PreexistingConnections) -> None:
    connections.begin("uid", nodes.target)
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    with near, far:
        redirect(nodes, PRESERVE)
        assert names(connections.applied("uid", nodes.target)) == {ends(near)}
        assert carries(near, far)


def test_a_handshake_under_way_counts_until_it_is_captured(nodes: Pair, connections: PreexistingConnections) -> None:
    """Its SYN went out before the rules; when it is repeated, they catch it."""
    rules(nodes.host, DEAF)
    with nodes.pod.make() as opening, nodes.pod.make() as ztunnel:
        opening.setblocking(False)
        opening.connect_ex((HOST4, 7000))
        rules(nodes.pod, HELD)  # the kernel repeats it after a second, which may pass here
        connections.begin("uid", nodes.target)
        ztunnel.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        ztunnel.bind(("0.0.0.0", 15001))
        ztunnel.listen()
        redirect(nodes, PRESERVE)
        (one,) = connections.applied("uid", nodes.target)
        assert one.state is TcpState.SYN_SENT
        rules(nodes.pod, "delete table inet held")
        ztunnel.settimeout(SECONDS)
        with ztunnel.accept()[0]:
            assert connections.remaining("uid", nodes.target) == ()


def test_a_handshake_that_ends_after_the_rules_survives(nodes: Pair, connections: PreexistingConnections) -> None:
    """The SYN went before them, all else comes after: nothing of it is redirected."""
    with nodes.host.listen(HOST4, 7000) as listener, nodes.pod.make() as near:
        rules(nodes.pod, LATE)
        near.setblocking(False)
        near.connect_ex((HOST4, 7000))
        connections.begin("uid", nodes.target)
        redirect(nodes, PRESERVE)
        assert [one.state for one in connections.applied("uid", nodes.target)] == [TcpState.SYN_SENT]
        rules(nodes.pod, "flush chain inet late prerouting")
        far, _ = listener.accept()  # the server has repeated its answer
        with far:
            near.settimeout(SECONDS)
            far.settimeout(SECONDS)
            assert carries(near, far)
        assert names(connections.remaining("uid", nodes.target)) == {ends(near)}


def test_a_handshake_of_a_client_that_ends_after_the_rules_survives(
    nodes: Pair, connections: PreexistingConnections
) -> None:
    """The pod has answered its SYN, and waits."""
    rules(nodes.host, MUTE)
    with nodes.pod.listen(POD4, 7000) as listener, nodes.host.connect(POD4, 7000) as near:
        connections.begin("uid", nodes.target)
        redirect(nodes, PRESERVE)
        assert [one.state in OPENING for one in connections.applied("uid", nodes.target)] == [True]
        rules(nodes.host, "delete table inet mute")
        near.sendall(b"x")
        far, _ = listener.accept()
        with far:
            far.settimeout(SECONDS)
            assert far.recv(1) == b"x" and carries(near, far)
            assert names(connections.remaining("uid", nodes.target)) == {ends(far)}


def test_state_survives_a_restart_of_the_agent(nodes: Pair, connections: PreexistingConnections) -> None:
    near, far = stream(nodes.pod, nodes.host, HOST4, 7000)
    with near, far:
        connections.begin("uid", nodes.target)
        note = connections.as_note("uid")  # already here: the agent may die while it applies the rules
        assert note == [int.from_bytes(near.getsockopt(socket.SOL_SOCKET, 57, 8), "little")]  # SO_COOKIE
        redirect(nodes, PRESERVE)
        connections.applied("uid", nodes.target)
        assert connections.as_note("uid") == note
        connections.close()
        new = PreexistingConnections()
        new.restore("uid", [*note, 1 << 60])
        with stream(nodes.host, nodes.host, HOST4, 7001)[0]:  # not the pod's
            assert names(new.remaining("uid", nodes.target)) == {ends(near)}
        assert new.as_note("uid") == note
        new.close()
