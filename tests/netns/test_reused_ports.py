# SPDX-License-Identifier: Apache-2.0
"""An application's connection that meets a conntrack entry of an ended connection does not escape.

NAT is asked for the first packet of an entry alone.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from support.pair import HOST4, HOST6, POD4, POD6, Pair, pair, rules
from support.rules import CHOICES, layers
from support.ztunnel import SECONDS

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.kernel import sysctl
from agent.kernel.exec import run
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
PORT, SERVICE, OUTBOUND, MARK = 40123, 7001, 15001, 0x539
TCP_REPAIR = 19  # linux/tcp.h: a socket closed in this mode sends nothing
WANT = Redirect(exclude=Exclusions(inbound_ports=((PORT, PORT),)))
SYN_SENT = "net/netfilter/nf_conntrack_tcp_timeout_syn_sent"
HOOK = "table inet t {{ chain c {{ type filter hook input priority 0; tcp dport {} {}; }}; }}"


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        yield made


def bound(nodes: Pair, there: str, mark: int = 0) -> socket.socket:
    """A socket of the pod that always has the same port."""
    made = nodes.pod.make(socket.AF_INET6 if ":" in there else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind(("", PORT))
    return made


def send(client: socket.socket, there: str) -> None:
    client.setblocking(False)
    client.connect_ex((there, SERVICE))


def vanish(*ends: socket.socket) -> None:
    for one in ends:
        one.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        one.close()


def reset(nodes: Pair, server: socket.socket, there: str) -> None:
    """The server resets ztunnel's connection."""
    with bound(nodes, there, MARK) as near:
        near.connect((there, SERVICE))
        far, _ = server.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        far.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def unanswered(nodes: Pair, server: socket.socket, there: str) -> None:
    """The server does not answer, and ztunnel gives up."""
    rules(nodes.host, HOOK.format(SERVICE, "drop"))
    with bound(nodes, there, MARK) as near:
        send(near, there)
    rules(nodes.host, "delete table inet t")


def outbound(nodes: Pair, server: socket.socket, there: str) -> None:
    """Of a connection of ztunnel's."""
    near = bound(nodes, there, MARK)
    near.connect((there, SERVICE))
    far, _ = server.accept()
    vanish(near, far)


def inbound(nodes: Pair, server: socket.socket, there: str) -> None:
    """Of an exempt connection from the server's port: the application's SYN goes the other way and has no entry."""
    with nodes.pod.listen("::" if ":" in there else "0.0.0.0", PORT) as listener:
        far = nodes.host.make(server.family)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        far.bind((there, SERVICE))
        far.connect((POD6 if ":" in there else POD4, PORT))
        near, _ = listener.accept()
        vanish(near, far)


@pytest.mark.parametrize("there", [HOST4, HOST6])
@pytest.mark.parametrize("end", [reset, unanswered])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_repeated_syn_is_captured(
    nodes: Pair, choice: str, end: Callable[[Pair, socket.socket, str], None], there: str
) -> None:
    settle(nodes.target, WANT, layers(choice))
    with servers(nodes, there) as (server, proxy):
        end(nodes, server, there)
        with bound(nodes, there) as client:
            send(client, there)
            assert select.select([server, proxy], [], [], SECONDS)[0] == [proxy]


@pytest.mark.parametrize("there", [HOST4, HOST6])
@pytest.mark.parametrize("end", [outbound, inbound])
@pytest.mark.parametrize("choice", CHOICES)
def test_no_syn_leaves_while_an_entry_lasts_that_saw_no_end(
    nodes: Pair, choice: str, end: Callable[[Pair, socket.socket, str], None], there: str
) -> None:
    settle(nodes.target, WANT, layers(choice))
    with servers(nodes, there) as (server, proxy):
        end(nodes, server, there)
        rules(nodes.host, HOOK.format(SERVICE, "counter"))
        with bound(nodes, there) as client:
            send(client, there)
            with contextlib.closing(nodes.target.netns.call(Conntrack)) as conntrack:
                for flow in list(conntrack.open_flows()):
                    conntrack.delete(flow)
            assert select.select([server, proxy], [], [], SECONDS)[0] == [proxy]
        assert "packets 0 " in run(["nft", "list", "table", "inet", "t"], netns=nodes.host.path).stdout


@pytest.mark.parametrize("choice", CHOICES)
def test_a_lost_syn_of_an_exempt_connection_is_repeated(nodes: Pair, choice: str) -> None:
    """It belongs to the entry of the first one, if the pod has a longer timeout of its own."""
    nodes.target.netns.call(lambda: sysctl.write(SYN_SENT, 60))
    settle(nodes.target, Redirect(exclude=Exclusions(outbound_ports=((SERVICE, SERVICE),))), layers(choice))
    with servers(nodes, HOST4) as (server, proxy):
        rules(nodes.host, HOOK.format(SERVICE, "drop"))
        with bound(nodes, HOST4) as client:
            send(client, HOST4)
            rules(nodes.host, "delete table inet t")
            assert select.select([server, proxy], [], [], SECONDS)[0] == [server]


@contextlib.contextmanager
def servers(nodes: Pair, there: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server on the host, and what stands for ztunnel."""
    server = nodes.host.make(socket.AF_INET6 if ":" in there else socket.AF_INET)
    with server, nodes.pod.listen("::" if ":" in there else "0.0.0.0", OUTBOUND) as proxy:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((there, SERVICE))
        server.listen()
        yield server, proxy
