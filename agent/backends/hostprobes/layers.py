# SPDX-License-Identifier: Apache-2.0
"""The layers of each mechanism of the host, in the order of application, and those to be cleaned away."""

from __future__ import annotations

from agent.backends.base import Layer
from agent.backends.hostprobes.branch_eni import BranchEni
from agent.backends.hostprobes.former import FormerLegacyRules, FormerNftVariantRules, FormerSets
from agent.backends.hostprobes.nft_layer import NftHostProbes
from agent.backends.hostprobes.want import HostProbes
from agent.kernel.host_netns import HostNetns

HostLayer = Layer[HostNetns, HostProbes]


def layers(choice: str) -> tuple[tuple[HostLayer, ...], tuple[HostLayer, ...]]:
    """Returns (active, retired) fresh layers of choice "nftables" or "off", in the order of their passes.

    None is probed. A set comes after the rules that refer to it.
    """
    active: tuple[HostLayer, ...] = (NftHostProbes(), BranchEni())
    former: tuple[HostLayer, ...] = (FormerLegacyRules(), FormerNftVariantRules(), FormerSets())
    return ((), (*reversed(active), *former)) if choice == "off" else (active, former)
