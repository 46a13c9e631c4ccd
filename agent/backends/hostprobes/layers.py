# SPDX-License-Identifier: Apache-2.0
"""The layers of each mechanism of the host, in the order of application, and those to be cleaned away."""

from __future__ import annotations

from collections.abc import Mapping

from agent.backends.hostprobes.branch_eni import BranchEni
from agent.backends.hostprobes.former import FormerLegacyRules, FormerNftVariantRules, FormerSets
from agent.backends.hostprobes.mechanism import HostMechanism
from agent.backends.hostprobes.nftables import NftHostProbes

# "off" is a choice: what was there before is removed.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("nftables", "branch-eni"),
    "off": (),
}


def layers(choice: str) -> tuple[tuple[HostMechanism, ...], tuple[HostMechanism, ...]]:
    """Returns (active, retired) fresh layers of a choice, both in the order of their passes. None is probed."""
    made: tuple[HostMechanism, ...] = (
        FormerSets(),
        NftHostProbes(),
        FormerNftVariantRules(),
        FormerLegacyRules(),
        BranchEni(),
    )
    by_name = {layer.name: layer for layer in made}
    active = tuple(by_name[name] for name in LAYERS[choice])
    return active, tuple(layer for layer in reversed(made) if layer not in active)
