# SPDX-License-Identifier: Apache-2.0
"""A new connection of the pod is said to go astray exactly when something of others leads it away from ztunnel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from support.ebpf import EbpfNode
from support.node import until
from support.pair import POD4, Pair
from support.pair import pair as made
from support.rules import CHOICES, layers

from agent.backends.syn_probe import led_astray
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import SockDiag
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()
WHAT = "a connection of the pod to 192.0.2.1:80 would "


def theirs(kind: str, hook: str, priority: int, rule: str) -> str:
    return f"nft 'table ip theirs {{ chain c {{ type {kind} hook {hook} priority {priority}; {rule}; }}; }}'"


LEGACY = "iptables-legacy -t nat -I OUTPUT -p tcp -j ACCEPT"
# (their rules, what is said of them)
SCRIPTS = [
    ("true", ""),
    (theirs("nat", "output", -150, "tcp dport 80 redirect to :7777"), WHAT + "go to 127.0.0.1:7777 instead of ztunnel"),
    (theirs("filter", "output", -310, "tcp dport 80 notrack"), ""),  # Sluice's rules refuse what NAT cannot redirect
    (theirs("filter", "output", -160, "tcp dport 80 meta mark set 0x539"), WHAT + "leave the pod uncaptured"),
    (theirs("nat", "output", -150, "accept"), ""),
    (theirs("filter", "output", -310, "ct zone set 7"), ""),
    (theirs("nat", "postrouting", 100, "masquerade"), ""),
    (theirs("filter", "output", -160, "drop"), ""),  # refused, which is not astray
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Pair]:
    with made() as both:
        yield both


@pytest.mark.parametrize("choice", CHOICES)
def test_what_goes_astray_is_said_whatever_leads_it_there(nodes: Pair, choice: str) -> None:
    def shell(script: str) -> None:
        run(["sh", "-ec", script], netns=nodes.pod.path)

    settle(nodes.target, WANT, layers(choice))
    try:
        for script, said in SCRIPTS:
            shell(script)
            found = led_astray(nodes.target, WANT)
            shell("nft add table ip theirs; nft delete table ip theirs")
            assert len(found) == bool(said) and all(line.startswith(said) for line in found), (script, found)
        shell(LEGACY)
        assert bool(led_astray(nodes.target, WANT)) == (choice == "iptables-legacy"), "others come before it"
        shell(LEGACY.replace("-I", "-D"))
    finally:
        settle(nodes.target, None, layers(choice))


def test_without_rules_it_leaves_and_what_is_excluded_may(nodes: Pair) -> None:
    settle(nodes.target, WANT, layers("nftables"))
    run(["nft", theirs("nat", "output", -150, "tcp dport 80 redirect to :7777")[5:-1]], netns=nodes.pod.path)
    assert led_astray(nodes.target, WANT)
    for exclude in (
        Exclusions(outbound_ports=((80, 80),)),
        Exclusions(outbound_networks=("192.0.2.0/24", "2001:db8::/32")),
        Exclusions(users=((0, 0),)),
        Exclusions(interfaces=("eth0",)),
    ):
        assert led_astray(nodes.target, Redirect(exclude=exclude)) == ()
    assert verify(nodes.target, WANT, layers("nftables")) == {}, "nothing was changed"
    run(["nft", "flush", "chain", "ip", "theirs", "c"], netns=nodes.pod.path)
    settle(nodes.target, None, layers("nftables"))
    families = [line.split(" to ")[1].split(" ")[0] for line in led_astray(nodes.target, WANT)]
    assert families == ["192.0.2.1:80", "[2001:db8::1]:80"]


def test_with_ebpf_a_socket_tells_and_nothing_is_sent(nodes: Pair) -> None:
    node = EbpfNode()
    try:
        want = Redirect(marks=False)
        settle(nodes.target, want, node.layers)
        assert led_astray(nodes.target, want, by_socket=True) == ()
        with closing(nodes.pod.call(SockDiag)) as diag:
            assert [one for one in diag.both() if one.remote[1] in (80, 15001)] == [], "nothing is left"
        for rules, said in (
            (
                theirs("nat", "output", -150, "tcp dport 15001 redirect to :7777"),
                "go to 127.0.0.1:7777 instead of ztunnel",
            ),
            (
                theirs("nat", "postrouting", 100, "masquerade random"),
                f"be reset: a rule changes its source from 127.0.0.1 to {POD4} and its port",
            ),
            (
                theirs("nat", "postrouting", 100, "snat to 198.51.100.7"),
                "be reset: a rule changes its source from 127.0.0.1 to 198.51.100.7",
            ),
            (theirs("nat", "postrouting", 100, "masquerade"), ""),
        ):
            run(["sh", "-ec", rules], netns=nodes.pod.path)
            lines = led_astray(nodes.target, want, by_socket=True)
            run(["nft", "delete table ip theirs"], netns=nodes.pod.path)
            assert len(lines) == bool(said) and all(line.startswith(WHAT + said) for line in lines), rules
        bpffs.remove_tree(node.pins.node.link("connect4"))
        found = until(lambda: led_astray(nodes.target, want, by_socket=True), "the kernel has detached the program")
        assert found == (WHAT + "leave the pod uncaptured",)
        run(["sysctl", "-qw", "net.ipv4.tcp_fastopen=0"], netns=nodes.pod.path)
        assert led_astray(nodes.target, want, by_socket=True) == (), "it cannot be tested"
        run(["sysctl", "-qw", "net.ipv4.tcp_fastopen=1"], netns=nodes.pod.path)
        settle(nodes.target, None, node.layers[::2])
    finally:
        node.close()
