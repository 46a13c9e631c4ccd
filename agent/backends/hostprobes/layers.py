# SPDX-License-Identifier: Apache-2.0
"""The layers of each mechanism of the host, in the order of application, and those to be cleaned away."""

from __future__ import annotations

from collections.abc import Mapping

from agent.backends.base import Layer
from agent.backends.hostprobes.branch_eni import BranchEni
from agent.backends.hostprobes.former import FormerLegacyRules, FormerNftVariantRules, FormerSets
from agent.backends.hostprobes.nft_layer import NftHostProbes
from agent.backends.hostprobes.want import HostProbes
from agent.kernel.host_netns import HostNetns

HostLayer = Layer[HostNetns, HostProbes]

# "off" is a choice: what was there before is removed.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("nftables", "branch-eni"),
    "off": (),
}


def layers(choice: str) -> tuple[tuple[HostLayer, ...], tuple[HostLayer, ...]]:
    """Returns (active, retired) fresh layers of a choice, both in the order of their passes. None is probed."""
    made: tuple[HostLayer, ...] = (
        FormerSets(),
        NftHostProbes(),
        FormerNftVariantRules(),
        FormerLegacyRules(),
        BranchEni(),
    )
    by_name = {layer.name: layer for layer in made}
    active = tuple(by_name[name] for name in LAYERS[choice])
    return active, tuple(layer for layer in reversed(made) if layer not in active)
