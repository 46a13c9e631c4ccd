"""The layers of each mechanism of the host, in the order of application, and those to be cleaned away."""

from __future__ import annotations

from collections.abc import Mapping

from agent.backends.hostprobes.branch_eni import BranchEni
from agent.backends.hostprobes.iptables import LegacyHostProbes, NftVariantHostProbes
from agent.backends.hostprobes.mechanism import HostMechanism
from agent.backends.hostprobes.nftables import NftHostProbes
from agent.backends.hostprobes.xt_sets import IpsetHostProbes

# Sets come before the rules that refer to them. "off" is a choice: what was there before is removed.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("nftables", "branch-eni"),
    "iptables": ("ipset", "iptables", "branch-eni"),
    "iptables-legacy": ("ipset", "iptables-legacy", "branch-eni"),
    "off": (),
}


def layers(choice: str) -> tuple[tuple[HostMechanism, ...], tuple[HostMechanism, ...]]:
    """(active, retired) fresh layers of a choice; both in the order in which they are worked on. None is probed."""
    made: tuple[HostMechanism, ...] = (
        IpsetHostProbes(),
        NftHostProbes(),
        NftVariantHostProbes(),
        LegacyHostProbes(),
        BranchEni(),
    )
    by_name = {layer.name: layer for layer in made}
    active = tuple(by_name[name] for name in LAYERS[choice])
    return active, tuple(layer for layer in reversed(made) if layer not in active)
