# SPDX-License-Identifier: Apache-2.0
"""Traffic that bypasses ztunnel is counted exactly, by every mechanism, and totals outlive the rules that count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.rules import CHOICES, Pod, layers
from support.rules import pod as made

from agent.backends import non_tcp
from agent.backends.non_tcp import INBOUND, OUTBOUND, Counts
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.lab.links import links
from agent.reconciler.converge import settle
from agent.sources.non_tcp_totals import NonTcpCounter

pytestmark = pytest.mark.root
SEND = """
import socket, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(count):
    s.sendto(b"x" * 72, (address, port))
"""


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made() as one:
        with links(one.name) as inside:
            inside.veth("eth0", "eth0p")
            inside.up("eth0p")
            inside.add_addresses("eth0", "192.0.2.2/24", "2001:db8::2/64")
            for address in ("192.0.2.9", "2001:db8::9"):
                eth0 = inside.index("eth0")
                inside.rtnl.neigh("add", dst=address, lladdr="02:00:00:00:00:09", ifindex=eth0, state="permanent")
        yield one


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def send(pod: Pod, address: str, port: int, count: int) -> None:
    run(["python3", "-c", SEND, address, str(port), str(count)], netns=pod.path)


def test_datagrams_are_counted_and_captured_dns_and_tcp_are_not(pod: Pod, choice: str) -> None:
    settle(pod.target, Redirect(), layers(choice))
    nothing = {INBOUND: Counts(), OUTBOUND: Counts()}
    assert non_tcp.read(choice, pod.target, Redirect()) == nothing
    send(pod, "192.0.2.9", 53, 2)
    send(pod, "127.0.0.1", 99, 2)
    tcp = "import socket; s = socket.socket(); s.setblocking(False); s.connect_ex(('192.0.2.9', 80))"
    run(["python3", "-c", tcp], netns=pod.path)
    assert non_tcp.read(choice, pod.target, Redirect()) == nothing
    send(pod, "192.0.2.9", 99, 3)
    send(pod, "2001:db8::9", 99, 2)
    found = non_tcp.read(choice, pod.target, Redirect())
    assert found == {INBOUND: Counts(), OUTBOUND: Counts(5, 3 * 100 + 2 * 120)}


def test_totals_outlive_a_change_and_a_repair(pod: Pod, choice: str) -> None:
    used, totals = layers(choice), NonTcpCounter(choice)

    def make(want: Redirect) -> None:
        totals.count("web", pod.target, want)
        settle(pod.target, want, used)

    make(Redirect())
    send(pod, "192.0.2.9", 99, 3)
    make(Redirect(dns=False))
    send(pod, "192.0.2.9", 99, 4)
    totals.count("web", pod.target, Redirect(dns=False), now=True)
    assert totals.totals("web")[OUTBOUND].packets == 7
    settle(pod.target, None, used)
    settle(pod.target, Redirect(dns=False), used)  # as a repair, unseen by the totals
    send(pod, "192.0.2.9", 99, 1)
    totals.count("web", pod.target, Redirect(dns=False), now=True)
    assert totals.totals("web")[OUTBOUND] == Counts(8, 800)
    totals.forget("web")
    assert totals.totals("web") == {}
