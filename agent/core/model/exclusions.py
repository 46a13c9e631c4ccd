# SPDX-License-Identifier: Apache-2.0
"""Exclusions of a pod's traffic from capture: ports, networks, users, interfaces. Values and their parsing. Pure.

All of it comes from annotations, which a pod's author writes: anything that is not exactly right is refused here,
long before it gets near a rule.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]  # first and last, both included

# What the kernel takes as an interface name, less what a shell or a rule language could misread.
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,14}")
_NUMBER = re.compile(r"[0-9]{1,10}")
MOST = 256  # entries per list: an annotation must not make a rule set without bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """Sorted, merged, without overlaps, so that equal intents are equal values. Networks as ipaddress writes them."""

    outbound_ports: tuple[Range, ...] = ()
    inbound_ports: tuple[Range, ...] = ()
    outbound_networks: tuple[str, ...] = ()  # destinations
    inbound_networks: tuple[str, ...] = ()  # sources
    users: tuple[Range, ...] = ()  # ids of the processes that send
    interfaces: tuple[str, ...] = ()


NOTHING = Exclusions()


def ranges(text: str, highest: int, lowest: int = 0) -> tuple[Range, ...]:
    """Parses "80, 8000-9000" (or 8000:9000). Raises ValueError, naming the invalid part."""
    parsed: list[Range] = []
    for part in _parts(text):
        first, sign, last = part.replace(":", "-").partition("-")
        last = last if sign else first
        if not _NUMBER.fullmatch(first) or not _NUMBER.fullmatch(last):
            raise ValueError(part)
        if not lowest <= int(first) <= int(last) <= highest:
            raise ValueError(part)
        parsed.append((int(first), int(last)))
    return merged(parsed)


def merged(unsorted: Iterable[Range]) -> tuple[Range, ...]:
    """Sorts them; ranges that overlap or touch become one."""
    result: list[Range] = []
    for first, last in sorted(unsorted):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return tuple(result)


def within(number: int, ranges: Iterable[Range]) -> bool:
    return any(first <= number <= last for first, last in ranges)


def ports(text: str) -> tuple[Range, ...]:
    return ranges(text, 65535, 1)


def users(text: str) -> tuple[Range, ...]:
    return ranges(text, 2**32 - 2)  # the last one means "no user" to the kernel


def networks(text: str) -> tuple[str, ...]:
    """Parses "10.0.0.0/8, fd00::/8, 192.0.2.1". Raises ValueError, naming the invalid part."""
    by_version: dict[int, list[Any]] = {4: [], 6: []}
    for part in _parts(text):
        try:
            network = ipaddress.ip_network(part, strict=False)
        except ValueError:
            raise ValueError(part) from None
        if "%" in part:
            raise ValueError(part)
        by_version[network.version].append(network)
    return tuple(str(network) for version in (4, 6) for network in ipaddress.collapse_addresses(by_version[version]))


def interfaces(text: str) -> tuple[str, ...]:
    """Returns names in their order, repeats dropped. Raises ValueError, naming the invalid part."""
    parsed: dict[str, None] = {}
    for part in _parts(text):
        if not INTERFACE.fullmatch(part):
            raise ValueError(part)
        parsed[part] = None
    return tuple(parsed)


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > MOST:
        raise ValueError(f"more than {MOST} entries")
    return parts


_OURS = "traffic.sluice.io/"
_SIDECAR = "traffic.sidecar.istio.io/"
PREFIXES = (_OURS, _SIDECAR)
# Field -> parser, what an entry is, our annotation, the sidecar's.
_ANNOTATIONS: Mapping[str, tuple[Callable[[str], tuple[Any, ...]], str, str, str]] = {
    "outbound_ports": (ports, "a port or range", "exclude-outbound-ports", "excludeOutboundPorts"),
    "inbound_ports": (ports, "a port or range", "exclude-inbound-ports", "excludeInboundPorts"),
    "outbound_networks": (networks, "a network", "exclude-outbound-cidrs", "excludeOutboundIPRanges"),
    "inbound_networks": (networks, "a network", "exclude-inbound-cidrs", ""),
    "users": (users, "a user id or range", "exclude-outbound-uids", ""),
    "interfaces": (interfaces, "an interface name", "exclude-interfaces", "excludeInterfaces"),
}


def exclusions(annotations: Mapping[str, str], *, sidecar: bool, warnings: list[str]) -> Exclusions:
    """Reads a pod's annotations; `sidecar` honours those of the sidecar too (ours wins where both are set).

    An annotation with anything wrong in it is ignored as a whole, so that traffic is captured rather than
    exempted by a misreading; `warnings` gets a line for each.
    """
    fields: dict[str, Any] = {}
    for field, key in chosen(annotations, sidecar=sidecar).items():
        parse, what, _, _ = _ANNOTATIONS[field]
        try:
            fields[field] = parse(annotations[key])
        except ValueError as error:
            warnings.append(f"annotation {key}: {str(error)[:40]!r} is not {what}; the annotation is ignored")
    return Exclusions(**fields)


def chosen(annotations: Mapping[str, str], *, sidecar: bool) -> dict[str, str]:
    """Returns the annotation that counts for each field of Exclusions, where there is one."""
    keys_by_field = {}
    for field, (_, _, own, istio) in _ANNOTATIONS.items():
        keys = [_OURS + own, *([_SIDECAR + istio] if sidecar and istio else [])]
        key = next((key for key in keys if key in annotations), None)
        if key is not None:
            keys_by_field[field] = key
    return keys_by_field
