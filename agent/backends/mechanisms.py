"""All layers that there are, by name and in the order in which they are shown."""

from __future__ import annotations

from agent.backends.base import Backend
from agent.backends.iptables.backend import IptablesBackend
from agent.backends.iptables.legacy import IptablesLegacyBackend
from agent.backends.nftables.backend import NftablesBackend
from agent.backends.routing import RoutingBackend


def mechanisms(*, ipv6: bool = True) -> dict[str, Backend]:
    """Fresh ones; none is probed yet. Without `ipv6` none of them needs IPv6 of the node."""
    netfilter = (NftablesBackend(ipv6=ipv6), IptablesBackend(ipv6=ipv6), IptablesLegacyBackend(ipv6=ipv6))
    made: tuple[Backend, ...] = (RoutingBackend(), *netfilter)
    return {backend.name: backend for backend in made}
