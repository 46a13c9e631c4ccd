"""What of a pod's TCP traffic is left alone: ports, addresses, users, interfaces. Values and their parsing. Pure.

All of it comes from annotations, which a pod's author writes: whatever is not exactly right is refused here,
long before it gets near a rule.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]  # first and last, both included


@dataclass(frozen=True, slots=True)
class Exclusions:
    """Sorted, merged and without overlaps, so that equal intents are equal values. Networks as ipaddress writes them."""

    outbound_ports: tuple[Range, ...] = ()
    inbound_ports: tuple[Range, ...] = ()
    outbound_networks: tuple[str, ...] = ()  # destinations
    inbound_networks: tuple[str, ...] = ()  # sources
    users: tuple[Range, ...] = ()  # ids of the processes that send
    interfaces: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != _NONE


_NONE = Exclusions()
