# SPDX-License-Identifier: Apache-2.0
"""`sluice uncapture --all` on the host: the exemption of probes goes, whatever made it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.hostworld import World, active, claimed, make_former, world
from support.hostworld import want as host_want

from agent.backends import layer_ownership
from agent.backends.hostprobes.layers import layers as host_layers
from agent.reconciler.converge import settle
from agent.reconciler.removal import LEFT, REMOVED, uncapture_host

pytestmark = pytest.mark.root


@pytest.fixture
def node() -> Iterator[World]:
    with world() as one:
        yield one


HOST_DAMAGE = {
    "nftables": ["nft flush chain inet istio-ambient-nat postrouting; nft flush set inet istio-ambient-nat"
                 " istio-inpod-probes-v4"],
    "iptables": ["iptables-nft -t nat -F POSTROUTING", "iptables-nft -t nat -F", "ipset flush istio-inpod-probes-v6"],
    "iptables-legacy": ["ip6tables-legacy -t nat -F", "iptables-legacy -t nat -F POSTROUTING"],
}  # fmt: skip


def exempt(node: World, mechanism: str, *, owned: bool = False) -> None:
    """What an agent that is gone left on the host, of this version or an earlier one."""
    if mechanism != "nftables":
        return make_former(node, mechanism)
    want = host_want(claimed(("uid-a", node.a.both), ("uid-b", node.b.both)))
    settle(node.target, want, active(owned=owned))
    node.reopen()


@pytest.mark.parametrize("mechanism", HOST_DAMAGE)
def test_the_hosts_exemption_goes_whatever_made_it(node: World, mechanism: str) -> None:
    node.host.sh(
        "nft add table ip mine; nft add chain ip mine out '{ type nat hook postrouting priority 100; }'"
        "; iptables-legacy -t nat -L >/dev/null; ip6tables-legacy -t nat -L >/dev/null; ipset create other hash:ip"
    )
    before = node.dump()
    exempt(node, mechanism, owned=mechanism == "nftables")
    exempted = node.dump()
    assert exempted != before
    removal = uncapture_host(node.target, host_layers("off")[1], layer_ownership.host_layer_owner, dry_run=True)
    assert removal is not None and removal.scripts and node.dump() == exempted
    removal = uncapture_host(node.target, host_layers("off")[1], layer_ownership.host_layer_owner)
    assert removal is not None and removal.result == REMOVED
    assert node.dump() == before
    assert uncapture_host(node.target, host_layers("off")[1], layer_ownership.host_layer_owner) is None


@pytest.mark.parametrize(("mechanism", "damage"), [(name, one) for name in HOST_DAMAGE for one in HOST_DAMAGE[name]])
def test_a_half_removed_exemption_goes_all_the_same(node: World, mechanism: str, damage: str) -> None:
    node.host.sh("iptables-legacy -t nat -L >/dev/null; ip6tables-legacy -t nat -L >/dev/null")
    before = node.dump()
    exempt(node, mechanism)
    node.host.sh(damage)
    removal = uncapture_host(node.target, host_layers("off")[1], layer_ownership.host_layer_owner)
    if mechanism == "nftables":  # nothing of ours is left to be told by
        assert removal is not None and removal.result == LEFT
        return
    assert removal is not None and removal.result == REMOVED
    assert node.dump() == before


def test_the_exemption_of_istio_cni_is_left_alone(node: World) -> None:
    """With the sets that its rules refer to, which ours share in name."""
    node.host.sh(
        "ipset create istio-inpod-probes-v4 hash:ip comment; iptables-nft -t nat -N ISTIO_POSTRT;"
        "iptables-nft -t nat -I POSTROUTING 1 -j ISTIO_POSTRT;"
        "iptables-nft -t nat -A ISTIO_POSTRT -m owner --socket-exists -p tcp -m set"
        " --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127"
    )
    before = node.dump()
    removal = uncapture_host(node.target, host_layers("off")[1], layer_ownership.host_layer_owner)
    assert removal is not None and removal.result == LEFT
    assert node.dump() == before
