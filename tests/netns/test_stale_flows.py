# SPDX-License-Identifier: Apache-2.0
"""A connection that ended while the pod had no rules leaves nothing in conntrack that a new connection would join.

Without rules the kernel does not call conntrack in the namespace, and the entry does not see the end.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node import until
from support.pair import HOST4, HOST6, Pair, carries, pair
from support.rules import layers
from support.ztunnel import SECONDS

from agent.core.model.redirect import Redirect
from agent.kernel.netlink.ctnetlink import Conntrack, TcpFlow
from agent.reconciler.converge import settle
from agent.sources import stale_flows
from agent.sources.stale_flows import StaleFlows

pytestmark = pytest.mark.root
WANT = Redirect()
PORT, OUTBOUND = 40123, 15001


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        yield made


def opened(nodes: Pair, to: tuple[str, int], mark: int) -> socket.socket:
    """A connection from the pod that always has the same ports."""
    made = nodes.pod.make(socket.AF_INET6 if ":" in to[0] else socket.AF_INET)
    made.settimeout(SECONDS)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind(("", PORT))
    made.connect(to)
    return made


def is_tracked(nodes: Pair, there: str) -> bool:
    """The kernel takes conntrack's hooks away some time after the last rules that need them."""
    with nodes.pod.make(socket.AF_INET6 if ":" in there else socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.sendto(b"?", (there, 9))
        port = asking.getsockname()[1]
    return f"sport={port} " in nodes.target.netns.call(Path("/proc/thread-self/net/nf_conntrack").read_text)


@pytest.mark.parametrize("there", [HOST4, HOST6])
@pytest.mark.parametrize("first", ["ztunnel", "application"])
@pytest.mark.parametrize("choice", ["nftables", "iptables", "iptables-legacy"])
def test_a_connection_from_a_port_whose_entry_missed_the_end_goes_where_the_rules_say(
    nodes: Pair, choice: str, first: str, there: str
) -> None:
    used = layers(choice)
    settle(nodes.target, WANT, used)
    stale = StaleFlows()
    wildcard = "::" if ":" in there else "0.0.0.0"
    with nodes.host.listen(there, 7001) as server, nodes.pod.listen(wildcard, OUTBOUND) as proxy:
        reached = {"ztunnel": server, "application": proxy}
        marks = {"ztunnel": 0x539, "application": 0}
        second = "application" if first == "ztunnel" else "ztunnel"
        with opened(nodes, (there, 7001), marks[first]) as near:
            far, _ = reached[first].accept()
            settle(nodes.target, None, used)
            until(lambda: not is_tracked(nodes, there), "conntrack's hooks are gone")
            # A reset leaves no socket in TIME_WAIT, which would keep the port.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, "little") + bytes(4))
        settle(nodes.target, WANT, used)
        assert not stale.forget(nodes.target, changed=True), "nothing is open"
        # Without rules ztunnel's end of the application's connection has not heard of the reset.
        with far, opened(nodes, (there, 7001), marks[second]):
            taking, _, _ = select.select([server, proxy], [], [], SECONDS)
            assert taking == [reached[second]]


def test_a_live_connection_is_kept_and_one_that_was_half_closed_is_looked_at_again(
    nodes: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_flows, "FIRST_PAUSE", 0.0)
    used = layers("nftables")
    settle(nodes.target, WANT, used)
    stale = StaleFlows()
    with (
        nodes.host.listen(HOST4, 7001) as server,
        nodes.pod.listen("0.0.0.0", OUTBOUND) as proxy,
        nodes.pod.connect(HOST4, 7001) as app,
        proxy.accept()[0] as taken,
    ):
        with opened(nodes, (HOST4, 7001), 0x539) as near, server.accept()[0] as far:
            settle(nodes.target, None, used)
            until(lambda: not is_tracked(nodes, HOST4), "conntrack's hooks are gone")
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
            settle(nodes.target, WANT, used)
            assert stale.forget(nodes.target, changed=True)
            assert len(open_flows(nodes)) == 2
        # Conntrack has seen only one of its two ends.
        until(lambda: stale.forget(nodes.target, changed=False) and len(open_flows(nodes)) == 1, "it is gone")
        assert [flow.answering[0][1] for flow in open_flows(nodes)] == [OUTBOUND]
        assert carries(app, taken)


def open_flows(nodes: Pair) -> list[TcpFlow]:
    with contextlib.closing(nodes.target.netns.call(Conntrack)) as conntrack:
        return list(conntrack.open_flows())
