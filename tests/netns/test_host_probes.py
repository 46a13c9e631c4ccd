# SPDX-License-Identifier: Apache-2.0
"""The node's probes reach an enrolled pod with the probe address, and nothing that is merely forwarded does.

With real connections: a namespace plays the host, routes between pods and an outside client,
and processes inside it play the kubelet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from support.hostworld import NOBODY, PROBE, World, active, claimed, make_former, want, world
from support.rules import layers as pod_layers

from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.layers import layers
from agent.backends.hostprobes.nft_layer import NftHostProbes
from agent.backends.hostprobes.want import SETS
from agent.core.errors import CommandError, StaleError
from agent.core.model.redirect import Redirect
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import Port, join, links
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
FOREIGN = """
nft add table inet mine; nft add chain inet mine post '{ type nat hook postrouting priority 90; }'
nft add rule inet mine post tcp dport 99 counter accept
iptables-nft -t nat -A POSTROUTING -p tcp --dport 98 -j ACCEPT; ip6tables-nft -t nat -N OTHER
iptables-legacy -t nat -A POSTROUTING -p tcp --dport 97 -j ACCEPT; ip6tables-legacy -t nat -N OTHER
ipset create mine hash:ip; ipset add mine 192.0.2.1; ip rule add iif p1 lookup 300 pref 40
"""
A = "uid-a"


@pytest.fixture
def node() -> Iterator[World]:
    with world() as made:
        yield made


def wrong(node: World, claims: Claims) -> list[str]:
    return [line for lines, _ in verify(node.target, want(claims), active()).values() for line in lines]


@pytest.mark.parametrize("family", [4, 6])
def test_only_connections_of_the_nodes_own_processes_have_the_probe_address(node: World, family: int) -> None:
    settle(node.target, want(claimed((A, node.a.both))), active())
    pod = node.a.address(family)
    assert node.host.connect(pod) == PROBE[family]
    assert node.host.connect(pod, user=NOBODY) == PROBE[family]
    assert node.outside.connect(pod) == node.outside.address(family)
    assert node.outside.connect(pod, user=NOBODY) == node.outside.address(family)
    assert node.b.connect(pod) == node.b.address(family)
    # Not enrolled.
    assert node.host.connect(node.b.address(family)) == node.b.host(family)


def test_pods_of_one_bridge_keep_their_addresses_although_their_sockets_are_of_this_kernel(node: World) -> None:
    """With bridge-nf-call-iptables a packet between them passes the host's chains still bound to its socket."""
    with links(node.host.name) as host:
        host.bridge("br0")
        host.add_addresses("br0", "10.82.9.1/24")
        for one, address in ((node.a, "10.82.9.2"), (node.b, "10.82.9.3")):
            join(Port(node.host.name, f"b{one.number}"), Port(one.name, "eth1", (f"{address}/24",)))
            host.up(f"b{one.number}", master="br0")
    node.host.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1")
    settle(node.target, want(claimed((A, ["10.82.9.2"]))), active())
    assert node.b.connect("10.82.9.2") == "10.82.9.3"
    assert node.host.connect("10.82.9.2") == PROBE[4]


def test_a_captured_pod_answers_its_nodes_probes_and_refuses_others_without_a_proxy(node: World) -> None:
    pod = PodNetns(Netns.open(node.a.path))
    try:
        settle(pod, Redirect(), pod_layers("nftables"))
        with pytest.raises(CommandError, match="refused"):
            node.host.connect(node.a.address(4))
        settle(node.target, want(claimed((A, node.a.both))), active())
        for family in (4, 6):
            assert node.host.connect(node.a.address(family)) == PROBE[family]
            with pytest.raises(CommandError, match="refused"):
                node.outside.connect(node.a.address(family))
    finally:
        pod.close()


@pytest.mark.parametrize("foreign", ["", FOREIGN], ids=["empty", "foreign"])
def test_what_is_applied_is_read_back_applied_once_and_removed_without_a_trace(node: World, foreign: str) -> None:
    # Legacy xtables cannot lose a table again, so there it is there before.
    node.host.sh(foreign or "iptables-legacy -t nat -L >/dev/null; ip6tables-legacy -t nat -L >/dev/null")
    before, claims = node.dump(), claimed((A, node.a.both), ("uid-b", node.b.both))
    assert settle(node.target, want(claims), active()).applied
    assert node.members() == {**dict.fromkeys(node.a.both, A), **dict.fromkeys(node.b.both, "uid-b")}
    assert wrong(node, claims) == []
    held = node.dump(), node.target.nft.generation()
    assert settle(node.target, want(claims), active()).applied == []
    assert (node.dump(), node.target.nft.generation()) == held
    node.reopen()
    settle(node.target, None, active())
    assert node.dump() == before
    assert settle(node.target, None, active()).applied == []


DAMAGE = [
    "nft flush ruleset",
    "nft delete table inet istio-ambient-nat",
    "nft flush chain inet istio-ambient-nat postrouting",
    "nft insert rule inet istio-ambient-nat postrouting accept",
    "nft flush set inet istio-ambient-nat istio-inpod-probes-v4",
    "nft add element inet istio-ambient-nat istio-inpod-probes-v6 '{ 2001:db8::99 }'",
    "nft add set inet istio-ambient-nat other '{ type ipv4_addr; }'",
    "nft add chain inet istio-ambient-nat postrouting '{ policy drop; }'",
    "nft delete table inet istio-ambient-nat; nft add table inet istio-ambient-nat;"
    "nft add set inet istio-ambient-nat istio-inpod-probes-v4 '{ type ipv4_addr; flags interval; }'",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_repaired(node: World, damage: str) -> None:
    claims = claimed((A, node.a.both))
    settle(node.target, want(claims), active())
    node.host.sh(damage)
    assert wrong(node, claims), damage
    settle(node.target, want(claims), active())
    assert wrong(node, claims) == []
    assert node.members() == dict.fromkeys(node.a.both, A)
    for family in (4, 6):
        assert node.host.connect(node.a.address(family)) == PROBE[family]


def test_who_else_translates_at_the_usual_priority_comes_after_us(node: World) -> None:
    settle(node.target, want(claimed((A, node.a.both))), active())
    node.host.sh(
        "nft add table ip theirs; nft add chain ip theirs post '{ type nat hook postrouting priority srcnat; }';"
        "nft add rule ip theirs post masquerade; iptables-nft -t nat -I POSTROUTING -j MASQUERADE;"
        "iptables-legacy -t nat -I POSTROUTING -j MASQUERADE"
    )
    assert node.host.connect(node.a.address(4)) == PROBE[4]


@pytest.mark.parametrize("variant", ["iptables", "iptables-legacy"])
@pytest.mark.parametrize("choice", ["nftables", "off"])
def test_the_form_of_earlier_versions_is_replaced_and_leaves_nothing(node: World, variant: str, choice: str) -> None:
    node.host.sh("iptables-legacy -t nat -L >/dev/null; ip6tables-legacy -t nat -L >/dev/null")
    node.host.sh("ipset create mine hash:ip; iptables-legacy -t nat -A POSTROUTING -p tcp --dport 97 -j ACCEPT")
    before, claims = node.dump(), claimed((A, node.a.both))
    make_former(node, variant)
    active_layers, retired = layers(choice)
    verified = verify(node.target, None, retired)
    assert verified.keys() == {"ipset", variant}
    settle(node.target, want(claims) if choice == "nftables" else None, active_layers, retired)
    assert verify(node.target, None, retired) == {}
    if choice == "nftables":
        assert node.host.connect(node.a.address(4)) == PROBE[4] and node.members() == dict.fromkeys(node.a.both, A)
        settle(node.target, None, *layers("off"))
    assert node.dump() == before


def test_a_set_of_another_type_under_our_name_stays(node: World) -> None:
    node.host.sh(f"ipset create {SETS[4]} hash:net")
    settle(node.target, None, *layers("off"))
    assert f"create {SETS[4]} hash:net" in node.dump()


def test_a_plan_for_another_generation_is_refused(node: World) -> None:
    (layer, _), claims = active(), claimed((A, node.a.both))
    plan = layer.plan(want(claims), layer.read(node.target))
    node.host.sh("nft add table inet other")
    with pytest.raises(StaleError):
        layer.apply(node.target, plan)
    assert node.members() == {}


def test_a_host_without_ipv6_gets_no_ipv6_rule(node: World) -> None:
    settle(node.target, want(claimed((A, node.a.both)), ipv6=False), active())
    assert node.members() == {node.a.address(4): A}
    assert "ip6" not in node.host.sh("nft list ruleset") and SETS[6] not in node.dump()


def test_p12_owned_tables_survive_a_flush_and_the_death_of_their_agent(node: World) -> None:
    probing = NftHostProbes()
    assert probing.probe().ok
    if not probing.owned:
        pytest.skip("a kernel before 6.9 has no owned tables")
    claims = claimed((A, node.a.both))
    settle(node.target, want(claims), active(owned=True))
    before = node.dump()
    node.host.sh("nft flush ruleset")
    assert node.dump() == before
    node.reopen()
    assert node.host.connect(node.a.address(4)) == PROBE[4]
    (taken,) = settle(node.target, want(claims), active(owned=True)).applied
    assert taken.script.startswith("# take over the ownership") and not taken.differences
    claims.claim("uid-b", node.b.both)
    settle(node.target, want(claims), active(owned=True))
    node.host.sh("nft flush ruleset")
    assert node.host.connect(node.b.address(4)) == PROBE[4]


def test_p13_a_pod_without_status_addresses_keeps_its_entry(node: World) -> None:
    settle(node.target, want(claimed((A, node.a.both), ("uid-b", node.b.both))), active())
    node.reopen()
    # A new agent that has seen nobody yet.
    settle(node.target, want(Claims(), complete=False), active())
    assert set(node.members()) == {*node.a.both, *node.b.both}
    # Then everybody: one pod without addresses, the other gone meanwhile.
    claims = claimed((A, ()))
    settle(node.target, want(claims), active())
    assert node.members() == dict.fromkeys(node.a.both, A)
    assert node.host.connect(node.a.address(4)) == PROBE[4]
    # Its addresses are told, and later not told again.
    claims.claim(A, [node.a.address(4)])
    claims.claim(A, [])
    settle(node.target, want(claims), active())
    assert node.members() == {node.a.address(4): A}


def test_p13_entries_that_must_stay_also_stay_in_a_table_made_anew(node: World) -> None:
    settle(node.target, want(claimed((A, node.a.both), ("uid-b", node.b.both))), active())
    node.host.sh("nft flush chain inet istio-ambient-nat postrouting")
    settle(node.target, want(claimed((A, ()))), active())
    assert node.members() == dict.fromkeys(node.a.both, A)


def orders(pods: str) -> list[tuple[str, ...]]:
    """Every order of a claim and a release of each pod, the claim first; upper case claims, lower case releases."""
    words = {order for order in itertools.permutations(pods.upper() + pods)}
    return sorted(w for w in words if all(w.index(p.upper()) < w.index(p) for p in pods))


def test_p23_address_reuse_in_every_order(node: World) -> None:
    """After each step the kernel holds the newest claimant that is left, whose probe is exempt; and then nobody."""
    used, address = active(), node.a.address(4)
    for order in orders("ab"):
        claims, living = Claims(), list[str]()
        for step in order:
            if step.isupper():
                claims.claim(step.lower(), [address])
                living.append(step.lower())
            else:
                claims.release(step)
                living.remove(step)
            settle(node.target, want(claims), used)
            assert node.members() == ({address: living[-1]} if living else {}), order
    claims = claimed(("a", [address]), ("b", [address]))
    claims.release("a")
    settle(node.target, want(claims), used)
    assert node.host.connect(address) == PROBE[4]


def test_p37_probe_over_ipv6_only() -> None:
    with world() as node:
        for one in (node.host, node.a, node.outside):
            one.sh("ip -4 addr flush scope global")
        settle(node.target, want(claimed((A, [node.a.address(6)]))), active())
        assert node.host.connect(node.a.address(6)) == PROBE[6]
        assert node.host.connect(node.a.address(6), user=NOBODY) == PROBE[6]
        assert node.outside.connect(node.a.address(6)) == node.outside.address(6)


@pytest.mark.parametrize("family", [4, 6])
def test_p42_branch_eni(node: World, family: int) -> None:
    """As the VPC CNI's strict mode leaves a node: the pod is known to table 101 alone, local comes after it."""
    pod, way = node.a.address(family), {4: "", 6: "-6"}[family]
    ip, size = f"ip {way}", {4: 32, 6: 128}[family]
    node.host.sh(
        f"{ip} rule add lookup local pref 20; {ip} rule del pref 0; {ip} rule add iif p1 lookup 101 pref 10;"
        f"{ip} rule add iif p3 lookup 101 pref 10; {ip} route add {pod}/{size} dev p1 table 101;"
        f"{ip} route add default via {node.outside.address(family)} table 101;"
        f"{ip} route add default via {node.outside.address(family)};"
        f"{ip} route del {'10.82.1.0/24' if family == 4 else 'fd82:1::/64'} dev p1"
    )
    rules = f"{ip} rule"
    before, claims = node.host.sh(rules), claimed((A, node.a.both), ("uid-b", node.b.both))
    home = node.host.sh(f"{ip} route get {pod}; {ip} route get {node.a.host(family)} from {pod} iif p1")
    assert home.count("dev p3") == 2 and "local" not in home, "both ways lead out of the node"
    settle(node.target, want(claims), active())
    shown = " ".join(node.host.sh(rules).split())
    assert "9: from all iif p1 lookup local" in shown and f"512: from all to {pod} lookup 101" in shown
    assert shown.count("512:") == 1 and shown.count("9: from all") == 1, "no other pod or device gets one"
    assert node.host.connect(pod) == PROBE[family]
    assert settle(node.target, want(claims), active()).applied == []
    # A pod whose addresses are not told keeps them; one that has gone does not.
    node.host.sh(f"{ip} rule del pref 512")
    settle(node.target, want(claims), active())
    assert node.host.connect(pod) == PROBE[family]
    node.reopen()
    settle(node.target, want(claimed((A, ()))), active())
    assert " ".join(node.host.sh(rules).split()) == shown
    claims.release(A)
    settle(node.target, want(claims), active())
    assert node.host.sh(rules) == before
