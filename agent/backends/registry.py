# SPDX-License-Identifier: Apache-2.0
"""All layers that there are, by name and in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from agent.backends.base import PodLayer
from agent.core import names

if TYPE_CHECKING:
    from agent.backends.ebpf.pins import Pins
    from agent.backends.ebpf.ztunnels import Ztunnels

LAYERS = ("routing", "conntrack", "nftables", "iptables", "iptables-legacy", "ebpf-programs", "ebpf")


def mechanisms(
    layers: Collection[str] = LAYERS,
    *,
    ipv6: bool = True,
    pins: Pins | None = None,
    ztunnels: Ztunnels | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, PodLayer]:
    """Makes these `layers`; none is probed yet. Imports only their modules: a start's first step is short.

    Without `ipv6` none of them needs IPv6 of the node. `pins`: where eBPF's are, by default where an agent has them by
    default; `ztunnels`: the processes that are known; `sizes`: of its maps, by name.
    """
    created = [_netfilter(layer, ipv6=ipv6) for layer in layers if not layer.startswith("ebpf")]
    if "ebpf" in layers:
        from agent.backends.ebpf.backend import EbpfBackend
        from agent.backends.ebpf.pins import Pins
        from agent.backends.ebpf.programs import ProgramsBackend
        from agent.backends.ebpf.ztunnels import Ztunnels

        where, known = pins or Pins.of(names.BPF_DIR), ztunnels or Ztunnels()
        created += [ProgramsBackend(where, known, sizes), EbpfBackend(where, known, sizes)]
    return {backend.name: backend for backend in created}


def _netfilter(layer: str, *, ipv6: bool) -> PodLayer:
    if layer == "nftables":
        from agent.backends.nftables.backend import NftablesBackend

        return NftablesBackend(ipv6=ipv6)
    if layer == "iptables":
        from agent.backends.iptables.backend import IptablesBackend

        return IptablesBackend(ipv6=ipv6)
    if layer == "iptables-legacy":
        from agent.backends.iptables.legacy import IptablesLegacyBackend

        return IptablesLegacyBackend(ipv6=ipv6)
    if layer == "conntrack":
        from agent.backends.conntrack import ConntrackBackend

        return ConntrackBackend()
    from agent.backends.routing import RoutingBackend

    return RoutingBackend()
