# SPDX-License-Identifier: Apache-2.0
"""The PROXY protocol's header, version 2, with which an application tunnel learns who connects and to what. Pure."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

from agent.ztunnel.hbone.next_hop import Address
from agent.ztunnel.tls.spiffe import SpiffeId

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_2_PROXY: Final = 0x21
_STREAM: Final = {4: 0x11, 6: 0x21}  # TCP over IPv4, over IPv6
IDENTITY_TLV: Final = 0xD0  # Istio's own type: the peer's SPIFFE identity


def header(source: Address, destination: tuple[str, int], identity: SpiffeId | None) -> bytes:
    """Returns the header of a connection from `source` to `destination`.

    Where the families differ, both are written as IPv6, and the IPv4 address in its mapped form.
    """
    ends = [ip_address(source[0]), ip_address(destination[0])]
    version = 4 if all(end.version == 4 for end in ends) else 6
    packed = b"".join(end.packed if end.version == version else b"\0" * 10 + b"\xff\xff" + end.packed for end in ends)
    addresses = packed + struct.pack(">HH", source[1], destination[1])
    if identity is not None:
        name = str(identity).encode()
        addresses += struct.pack(">BH", IDENTITY_TLV, len(name)) + name
    return _SIGNATURE + struct.pack(">BBH", _VERSION_2_PROXY, _STREAM[version], len(addresses)) + addresses
