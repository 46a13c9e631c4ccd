# SPDX-License-Identifier: Apache-2.0
"""The account of DNS queries, of packets that a pod has sent: what it leaves out when there are too many."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess

import pytest
from scapy.layers.inet import IP, TCP
from support.node import until
from support.resolver import query
from support.rules import pod as made
from support.world import pod

from agent.flows.dns import dns_account
from agent.flows.dns.dns_account import DnsAccount

pytestmark = pytest.mark.root
SEGMENTS, QUERIES = 20, 40


def segment(number: int) -> bytes:
    """A TCP segment of no connection that has QUERIES queries."""
    messages = [query("a", number * QUERIES + one) for one in range(QUERIES)]
    payload = b"".join(len(one).to_bytes(2) + one for one in messages)
    return bytes(IP(src="127.0.0.1", dst="127.0.0.1") / TCP(sport=40000, dport=53, flags="PA") / payload)


@pytest.mark.parametrize("turn", [10.0, 0.0])
def test_packets_that_take_longer_than_the_turn_of_a_pod_are_lost(turn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_account, "_TURN", turn)
    with made("slu-dnsacc0") as place, contextlib.closing(DnsAccount(None)) as account:
        account.enrol(pod(), place.target)
        with place.target.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw:
            for number in range(SEGMENTS):
                raw.sendto(segment(number), ("127.0.0.1", 0))
        asyncio.run(account.look())
        (held,) = account._pods.values()
        assert held.queries.waiting is bool(turn)  # else they would seem to have had no answer
        assert account.lost == (0 if turn else SEGMENTS)


BRIDGE = """
link add port type veth peer name far
link add bridge type bridge
link set port master bridge
link set far up
link set port up
link set bridge up
addr add 10.9.0.1/24 dev bridge
neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev bridge
"""


def test_a_query_that_passes_a_bridge_and_its_port_is_one() -> None:
    with made("slu-dnsacc1") as place, contextlib.closing(DnsAccount(None)) as account:
        command = ["ip", "-batch", "-"]
        place.target.netns.call(lambda: subprocess.run(command, input=BRIDGE, text=True, check=True))
        show = ["ip", "-o", "link", "show", "up", "type", "bridge"]
        wait = lambda: b"state UP" in place.target.netns.call(lambda: subprocess.check_output(show))  # noqa: E731
        until(wait, "the kernel drops what is sent before it has noticed the bridge's carrier")
        account.enrol(pod(), place.target)
        (held,) = account._pods.values()
        with place.target.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
            client.sendto(query("a.test"), ("10.9.0.2", 53))
        asyncio.run(account.look())
        assert (len(held.queries._pending), list(held.kept)) == (1, [])
