"""All layers that there are, by name and in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from agent.backends.base import Backend
from agent.backends.conntrack import ConntrackBackend
from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.iptables.backend import IptablesBackend
from agent.backends.iptables.legacy import IptablesLegacyBackend
from agent.backends.nftables.backend import NftablesBackend
from agent.backends.routing import RoutingBackend
from agent.core import names


def mechanisms(
    *,
    ipv6: bool = True,
    pins: Pins | None = None,
    ztunnels: Ztunnels | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Backend]:
    """Fresh ones; none is probed yet. Without `ipv6` none of them needs IPv6 of the node.

    `pins`: where eBPF's are, by default where an agent has them by default; `ztunnels`: the processes that are known;
    `sizes`: of its maps, by name.
    """
    where, known = pins or Pins.of(names.BPF_DIR), ztunnels or Ztunnels()
    netfilter = (NftablesBackend(ipv6=ipv6), IptablesBackend(ipv6=ipv6), IptablesLegacyBackend(ipv6=ipv6))
    ebpf = (ProgramsBackend(where, known, sizes), EbpfBackend(where, known, sizes))
    made: tuple[Backend, ...] = (RoutingBackend(), ConntrackBackend(), *netfilter, *ebpf)
    return {backend.name: backend for backend in made}
