# SPDX-License-Identifier: Apache-2.0
"""Foreign rules before ours: what is told of them is what they do to real packets."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest
from support.pair import HOST4, HOST6, POD4, POD6, Pair
from support.pair import pair as made
from support.rules import layers
from support.ztunnel import Place

from agent.core import names
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.lab.links import links
from agent.reconciler.converge import in_the_way, settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()
REMOTE = "198.51.100.77"
THEIRS = 7777  # where foreign rules send what they take
KUBEVIRT = """
table ip nat {
  chain prerouting { type nat hook prerouting priority -100; }
  chain output { type nat hook output priority -100; }
  chain postrouting { type nat hook postrouting priority 100; }
  chain KUBEVIRT_PREINBOUND { counter dnat to 10.0.2.2; }
  chain KUBEVIRT_POSTINBOUND { }
}
add rule ip nat prerouting iifname "eth0" counter jump KUBEVIRT_PREINBOUND
add rule ip nat postrouting ip saddr 10.0.2.2 counter masquerade
add rule ip nat postrouting oifname "k6t-eth0" counter jump KUBEVIRT_POSTINBOUND
add rule ip nat output ip daddr 127.0.0.1 counter dnat to 10.0.2.2
"""


def output(priority: int, rule: str, kind: str = "nat", flags: str = "") -> str:
    chain = f"chain out {{ type {kind} hook output priority {priority}; {rule}; }}"
    return f"nft 'table ip theirs {{ {flags} {chain}; }}'"


XT = "iptables-nft -t nat"
# (backend, their rules, whether made before ours, what is told of them or "" when they take nothing)
OUTBOUND = [
    ("nftables", output(-150, f"tcp dport 80 redirect to :{THEIRS}"), True,
     "chain ip theirs out, priority -150: 1 rule with redirect (l4proto tcp dport 80 redirect)"),
    ("nftables", output(-100, f"meta l4proto tcp dnat to 10.78.0.2:{THEIRS}"), False,
     "chain ip theirs out, priority -100: 1 rule with dnat (l4proto tcp dnat to 10.78.0.2)"),
    ("nftables", output(-100, f"meta l4proto tcp redirect to :{THEIRS}"), True, ""),
    ("nftables", output(-50, f"meta l4proto tcp redirect to :{THEIRS}"), False, ""),
    ("nftables", output(-150, "meta l4proto tcp accept"), False, ""),
    ("nftables", output(-150, f"udp dport 80 redirect to :{THEIRS}"), False, ""),
    ("nftables", output(-150, f"ip daddr 127.0.0.0/8 tcp dport 80 redirect to :{THEIRS}"), False, ""),
    ("nftables", output(-150, f"oifname lo tcp dport 80 redirect to :{THEIRS}"), False, ""),
    ("nftables", output(-150, f"meta l4proto tcp redirect to :{THEIRS}", flags="flags dormant;"), False, ""),
    ("nftables", output(-150, "tcp dport 80 drop", "filter"), False,
     "chain ip theirs out, priority -150: 1 rule with drop (l4proto tcp dport 80 drop)"),
    ("nftables", output(-150, "meta l4proto tcp meta mark set 0x539", "filter"), True,
     "chain ip theirs out, priority -150: 1 rule with mark (l4proto tcp mark set 0x539)"),
    ("nftables", output(-310, "tcp dport 80 notrack", "filter"), False,
     "chain ip theirs out, priority -310: 1 rule with notrack (l4proto tcp dport 80 notrack)"),
    ("nftables", output(-150, "meta mark set meta mark | 0x10000", "filter"), False, ""),
    ("nftables", f"{XT} -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports {THEIRS}", False,
     "chain ip nat OUTPUT, priority -100: 1 rule with redirect"),
    ("nftables", f"{XT} -N X; {XT} -A X -p tcp -j REDIRECT --to-ports {THEIRS}; {XT} -A OUTPUT -p tcp -j X", False,
     "chain ip nat OUTPUT, priority -100: 1 rule with redirect"),
    ("nftables", f"{XT} -A OUTPUT -p tcp -j ACCEPT", False, ""),
    ("iptables", f"{XT} -I OUTPUT -p tcp --dport 80 -j ACCEPT", False,
     "chain ip nat OUTPUT before our jump, priority -100: 1 rule with accept (l4proto tcp dport 80 accept)"),
    ("iptables", f"{XT} -A OUTPUT -p tcp -j RETURN", True,
     "chain ip nat OUTPUT before our jump, priority -100: 1 rule with return (l4proto tcp return)"),
    ("iptables", f"{XT} -A OUTPUT -p tcp -j REDIRECT --to-ports {THEIRS}", False, ""),
    ("iptables", f"{XT} -N X; {XT} -A X -j RETURN; {XT} -I OUTPUT -j X", False, ""),
    ("iptables", f"{XT} -N X; {XT} -A X -p tcp -j ACCEPT; {XT} -I OUTPUT -p tcp -j X", False,
     "chain ip nat OUTPUT before our jump, priority -100: 1 rule with accept (l4proto tcp jump X: l4proto tcp accept)"),
    ("iptables", output(-150, f"tcp dport 80 redirect to :{THEIRS}"), False,
     "chain ip theirs out, priority -150: 1 rule with redirect (l4proto tcp dport 80 redirect)"),
    ("iptables", "iptables-nft -t raw -I OUTPUT -p tcp --dport 80 -j CT --notrack", False,
     "chain ip raw OUTPUT before our jump, priority -300: 1 rule with notrack (l4proto tcp dport 80 CT)"),
    ("iptables-legacy", output(-150, f"tcp dport 80 redirect to :{THEIRS}"), False,
     "chain ip theirs out, priority -150: 1 rule with redirect (l4proto tcp dport 80 redirect)"),
    ("iptables-legacy", output(-150, "meta l4proto tcp meta mark set 0x539", "filter"), True,
     "chain ip theirs out, priority -150: 1 rule with mark (l4proto tcp mark set 0x539)"),
]  # fmt: skip


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with made() as both:
        with links(both.pod.name) as pod, links(both.host.name) as host:
            pod.veth("k6t-eth0", "tap0")
            pod.add_addresses("k6t-eth0", "10.0.2.1/24")
            host.add_addresses("lo", f"{REMOTE}/32")
        yield both


def prepare(nodes: Pair, choice: str, script: str, *, before: bool) -> tuple[str, ...]:
    """Puts ours and theirs in; what fresh layers then remark, which have nothing to repair."""
    used = layers(choice)
    for part in ("theirs", "ours") if before else ("ours", "theirs"):
        if part == "ours":
            settle(nodes.target, WANT, used)
        else:
            run(["sh", "-ec", script], netns=nodes.pod.path)
    for again in (used, layers(choice)):
        assert verify(nodes.target, WANT, again) == {}, "remarks are no drift"
    found = settle(nodes.target, WANT, used).remarks
    assert in_the_way(nodes.target, [(one, WANT) for one in used]) == found
    return found


def arrival(ours: Place, port: int, client: Place, to: str, *others: socket.socket) -> str:
    """Where a connection to port 80 comes out: "ours", "theirs", or "" for nowhere within a second."""
    with ours.listen("0.0.0.0", port) as mine, client.make() as connecting:
        connecting.setblocking(False)
        connecting.connect_ex((to, 80))
        ready, _, _ = select.select([mine, *others], [], [], 1)
        return "ours" if mine in ready else "theirs" if ready else ""


@pytest.mark.parametrize(("choice", "script", "before", "told"), OUTBOUND)
def test_a_chain_is_told_of_exactly_when_it_takes_the_traffic(
    nodes: Pair, choice: str, script: str, before: bool, told: str
) -> None:
    found = prepare(nodes, choice, script, before=before)
    with nodes.pod.listen("0.0.0.0", THEIRS) as theirs, nodes.host.listen(REMOTE, 80) as there:
        fate = arrival(nodes.pod, names.OUTBOUND_PORT, nodes.pod, REMOTE, theirs, there)
    assert (fate == "ours") == (not told), f"it came out at {fate!r}"
    assert len(found) == bool(told) and all(line.startswith(told) for line in found), found


@pytest.mark.parametrize("before", [True, False], ids=["first", "later"])
def test_p60b_kubevirts_masquerade_is_told_of_when_it_comes_before_ours(nodes: Pair, before: bool) -> None:
    found = prepare(nodes, "nftables", f"nft -f - <<'END'{KUBEVIRT}END", before=before)
    fate = arrival(nodes.pod, names.INBOUND_PORT, nodes.host, POD4)
    counter = run(["nft", "list", "chain", "ip", "nat", "KUBEVIRT_PREINBOUND"], netns=nodes.pod.path).stdout
    if before:
        assert fate == "ours" and found == ()
        return
    assert fate == "" and "packets 0" not in counter, "nobody else took it"
    assert found == (
        "chain ip nat prerouting, priority -100: 1 rule with dnat "
        "(iifname eth0 jump KUBEVIRT_PREINBOUND: dnat to 10.0.2.2)",
    )


BEFORE = [
    "ip rule add pref 100 lookup 77; ip route add default dev lo table 77",
    "ip rule add pref 100 from 10.0.0.0/8 lookup main",
    "ip rule add not fwmark 0xca6c lookup 77; ip rule add table main suppress_prefixlength 0",  # wg-quick
    "ip rule add pref 100 goto 32766",
    "ip -6 rule add pref 100 unreachable",
    "ip rule add pref 100 lookup 100",
    "ip rule add pref 100 fwmark 1 lookup 100; ip route replace local default dev lo table 100",  # TPROXY
    "ip route add 192.0.2.0/24 dev lo table 100",
    "ip rule add pref 32764 iif eth0 lookup main",
    "ip rule add pref 100 fwmark 0x5 lookup main",
]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("script", BEFORE)
def test_marked_packets_stay_here_whatever_routing_the_pod_has_and_that_stays(
    nodes: Pair, script: str, first: bool
) -> None:
    def routing() -> str:
        words = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
        return run(["sh", "-c", words], netns=nodes.pod.path).stdout

    if not first:
        settle(nodes.target, WANT, layers("nftables"))
    run(["sh", "-ec", script], netns=nodes.pod.path)
    theirs = routing() if first else ""
    assert settle(nodes.target, WANT, layers("nftables")).remarks == ()
    assert verify(nodes.target, WANT, layers("nftables")) == {}, "a fresh process finds what was taken"
    family, to, source = ("-6", HOST6, POD6) if "-6" in script else ("-4", HOST4, POD4)
    got = run(["ip", family, "route", "get", to, "from", source, "mark", "0x111"], netns=nodes.pod.path).stdout
    assert got.startswith("local ") and " dev lo " in got
    settle(nodes.target, None, layers("nftables"))
    left = routing()
    assert left == theirs if first else "0x111" not in left and "proto 83" not in left


def test_a_policy_rule_that_none_can_come_before_is_told_of(nodes: Pair) -> None:
    found = prepare(nodes, "nftables", "ip rule add pref 0 lookup main", before=False)
    assert found == ("policy rule of IPv4 with preference 0: lookup main",)
