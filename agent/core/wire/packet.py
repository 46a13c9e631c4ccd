# SPDX-License-Identifier: Apache-2.0
"""A TCP SYN as an IP packet, and what a packet's first bytes say: for tests that look at the wire. Pure.

RFC 791, 8200, 9293. Only headers without options and extensions are made; of others nothing is known.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field

TCP, UDP = 6, 17
SYN, RST, ACK = 2, 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """`flags` are those of TCP, 0 for UDP. `payload` is what was there of it, when the packet was parsed."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    flags: int = 0
    payload: bytes = field(default=b"", compare=False, repr=False)


def syn(source: str, source_port: int, destination: str, destination_port: int, hops: int = 64) -> bytes:
    """Returns the first packet of a connection, checksums included; both addresses are of one family."""
    here = ipaddress.ip_address(source).packed
    there = ipaddress.ip_address(destination).packed
    parts = (source_port, destination_port, 1, 0, 5 << 4, SYN, 65535)
    bare = struct.pack("!HHIIBBHHH", *parts, 0, 0)
    pseudo = here + there + struct.pack("!II", len(bare), TCP)
    segment = struct.pack("!HHIIBBHHH", *parts, _checksum(pseudo + bare), 0)
    if len(here) == 16:
        return struct.pack("!IHBB", 6 << 28, len(segment), TCP, hops) + here + there + segment
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(segment), 0, 0, hops, TCP)
    end = here + there
    return start + struct.pack("!H", _checksum(start + bytes(2) + end)) + end + segment


def parse(data: bytes) -> Packet | None:
    """Parses a packet; None for one that is neither TCP nor UDP right behind an IP header."""
    if len(data) < 20 or data[0] >> 4 not in (4, 6):
        return None
    four = data[0] >> 4 == 4
    size = (data[0] & 15) * 4 if four else 40
    protocol, (first, last) = (data[9], (12, 20)) if four else (data[6], (8, 40))
    if protocol not in (TCP, UDP) or len(data) < size + (14 if protocol == TCP else 4):
        return None
    middle = (first + last) // 2
    addresses = [str(ipaddress.ip_address(part)) for part in (data[first:middle], data[middle:last])]
    ports = struct.unpack_from("!HH", data, size)
    flags = data[size + 13] if protocol == TCP else 0
    return Packet(
        protocol=protocol,
        source=addresses[0],
        source_port=ports[0],
        destination=addresses[1],
        destination_port=ports[1],
        flags=flags,
        payload=data[size + (8 if protocol == UDP else (data[size + 12] >> 4) * 4) :],
    )


def _checksum(data: bytes) -> int:
    """Returns the checksum of RFC 1071; `data` is of even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
