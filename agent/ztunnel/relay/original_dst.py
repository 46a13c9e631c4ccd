# SPDX-License-Identifier: Apache-2.0
"""The original destination of a captured connection, and addresses as text."""

from __future__ import annotations

import socket
import struct

from agent.core import names

# (host, port) for IPv4, (host, port, flow, scope) for IPv6; v4-mapped addresses always as IPv4.
Address = tuple[str, int] | tuple[str, int, int, int]

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; the same number at level IPV6
OWN_PORTS = frozenset((names.OUTBOUND_PORT, names.INBOUND_PORT, names.HBONE_PORT, names.DNS_PORT))
_MAPPED = "::ffff:"
_ANY = {2: "0.0.0.0", 4: "::"}  # by the length of an Address


def plain(address: Address) -> Address:
    """Returns IPv4 for a v4-mapped address, and any other address unchanged."""
    host = address[0]
    if len(address) == 4 and host.startswith(_MAPPED) and "." in host:
        return host[len(_MAPPED) :], address[1]
    return address


def original_destination(accepted: socket.socket, peer: Address) -> tuple[Address, bool]:
    """Returns the destination before redirection: from conntrack, or else the accepted socket's own address.

    The second value is True if `peer`, its peer's address after `plain`, is that of the client's socket: the eBPF
    programs show the pod's own address in place of a loopback one, and mark that. Raises OSError when the connection is
    gone.
    """
    try:
        if len(peer) == 2:
            found = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
            return parse_ipv4(found), not found[8]
        found = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        return parse_ipv6(found), not found[4] >> 4
    except OSError:
        # No entry, or no conntrack: redirected without NAT, or not redirected.
        local: Address = plain(accepted.getsockname())
        return local, True


def source_to_keep(peer: Address, is_clients: bool) -> Address:
    """Returns the source for the onward connection: the address of the client's socket if it is known, and its port.

    `is_clients` is the second value of `original_destination`.
    """
    return peer if is_clients else (_ANY[len(peer)], *peer[1:])


def parse_ipv4(sockaddr: bytes) -> Address:
    """Parses a struct sockaddr_in."""
    return socket.inet_ntop(socket.AF_INET, sockaddr[4:8]), struct.unpack_from(">H", sockaddr, 2)[0]


def parse_ipv6(sockaddr: bytes) -> Address:
    """Parses a struct sockaddr_in6: family, port, flow, 16 bytes of address, scope in host order."""
    port: int = struct.unpack_from(">H", sockaddr, 2)[0]
    scope: int = struct.unpack_from("=I", sockaddr, 24)[0]
    return socket.inet_ntop(socket.AF_INET6, sockaddr[8:24]), port, 0, scope


def is_own(destination: Address, accepted: socket.socket) -> bool:
    """Returns True if a connection to it would reach a listener of ztunnel in this pod, which is a loop."""
    if destination[1] not in OWN_PORTS:
        return False
    host = destination[0]
    return host == "::1" or host.startswith("127.") or host == plain(accepted.getsockname())[0]
