# SPDX-License-Identifier: Apache-2.0
"""bpf/abi.h in Python. Pure; a test compares both by BTF."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address, ip_address

VERSION = 1  # of the maps: one that an older program would misread gets a new number, and so a new directory
ADDRESS = 16
LISTENER_SLOTS = 2  # of one role in one pod: an old and a new ztunnel overlap
Address = IPv4Address | IPv6Address

_POD = struct.Struct("=IIQ16s16s16s16s16s")
_POLICY_KEY = struct.Struct("=IIQ16s")
_POLICY_VALUE = struct.Struct("=II")
_KEY = struct.Struct("=QII")  # of ztunnels, of listeners and of traffic that is not TCP
_TRAFFIC = struct.Struct("=QQ")
_COOKIE = struct.Struct("=Q")
_IPV4 = bytes(10) + b"\xff\xff"  # what IPv4 addresses begin with
MAPPED = 96  # bits of it, before an IPv4 address in ::ffff:a.b.c.d
_EXACT = 96  # bits of kind and policy, which every key of the policies begins with


class PodFlag(IntFlag):
    """enum pod_flags."""

    IPV4 = 1
    IPV6 = 2
    DNS = 4
    INGRESS_ONLY = 8
    REFUSE = 16
    FORWARDS = 32
    LOOPBACK4 = 64
    ETHERNET = 128
    CAPTURED = 256
    SINGLE = 512
    NO_HBONE = 1024
    KNOWN = 2048


class PolicyKind(IntEnum):
    """enum policy_kind."""

    OWN = 0
    TO = 1
    FROM = 2
    PORT_OUT = 3
    PORT_IN = 4
    USER = 5
    RESOLVER = 6
    ROUTE = 7
    INTERFACE = 8
    REACH = 9


class InterfaceRole(IntEnum):
    """enum interface_role."""

    NONE = 0
    VIRTUAL = 1
    EXCLUDED = 2


class ExitCause(IntEnum):
    """enum exit_cause: every way out of the programs."""

    CAPTURED_OUTBOUND = 0
    CAPTURED_INBOUND = 1
    CAPTURED_VIRTUAL = 2
    CAPTURED_DNS = 3
    ZTUNNEL = 4
    FORGED_MARK = 5
    LOOPBACK = 6
    PROBE = 7
    HBONE = 8
    FAMILY = 9
    INGRESS_ONLY = 10
    NOT_TCP = 11
    EXCLUDED_NETWORK = 12
    EXCLUDED_PORT = 13
    EXCLUDED_USER = 14
    EXCLUDED_INTERFACE = 15
    SPEAKS_AS = 16
    NO_LISTENER = 17
    ASSIGN_FAILED = 18
    MEMORY_FAILED = 19
    HANDOVER_FAILED = 20
    ESCAPE_REFUSED = 21
    NOT_TCP_REFUSED = 22
    INTERFACE_FAILED = 23
    MALFORMED = 24


_WIDTHS = {PolicyKind.PORT_OUT: 16, PolicyKind.PORT_IN: 16, PolicyKind.USER: 32}  # of what is no address, in bits


@dataclass(frozen=True, slots=True, kw_only=True)
class PodValue:
    """struct pod. `policy` is the id of the prefixes that count for it, `has` their kinds; 0 for none."""

    flags: PodFlag
    has: int = 0
    policy: int = 0
    own4: Address | None = None
    own6: Address | None = None
    link6: Address | None = None
    probe4: Address | None = None
    probe6: Address | None = None

    def encode(self) -> bytes:
        parts = (address(a) for a in (self.own4, self.own6, self.link6, self.probe4, self.probe6))
        return _POD.pack(self.flags, self.has, self.policy, *parts)

    @classmethod
    def decode(cls, data: bytes) -> PodValue:
        """Raises ValueError for a value of another version."""
        if len(data) != _POD.size:
            raise ValueError(f"{len(data)} bytes are no pod")
        flags, has, policy, *parts = _POD.unpack(data)
        own4, own6, link6, probe4, probe6 = map(parse, parts)
        return cls(
            flags=PodFlag(flags),
            has=has,
            policy=policy,
            own4=own4,
            own6=own6,
            link6=link6,
            probe4=probe4,
            probe6=probe6,
        )


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """An entry of a policy: the first `bits` of `value` (16 bytes), and the verdict on addresses that begin so."""

    kind: PolicyKind
    value: bytes
    bits: int
    verdict: int = 1

    def __str__(self) -> str:
        name = self.kind.name.lower().replace("_", "-")
        number = int.from_bytes(self.value[:4])
        if self.kind is PolicyKind.INTERFACE:
            return f"{name} {number} {InterfaceRole(self.verdict).name.lower()}"
        if self.kind in _WIDTHS:
            width = _WIDTHS[self.kind]
            first = number >> (32 - width)
            last = first + (1 << (width - self.bits)) - 1
            return f"{name} {first}" + (f"-{last}" if last > first else "")
        # ::/0 has IPv4 in it, which a prefix of its own then takes out.
        four = self.bits >= MAPPED and self.value[:12] == _IPV4
        text = f"{ip_address(self.value[12:] if four else self.value)}/{self.bits - MAPPED if four else self.bits}"
        return f"{name} {text}" + ("" if self.verdict else " not")

    def key(self, policy: int) -> bytes:
        return _POLICY_KEY.pack(_EXACT + self.bits, self.kind, policy, self.value)

    def encode(self) -> bytes:
        return _POLICY_VALUE.pack(self.verdict, _EXACT + self.bits)


def prefix(key: bytes, value: bytes) -> tuple[int, Prefix]:
    """Returns the policy's id and the prefix, from map `policies`."""
    bits, kind, policy, content = _POLICY_KEY.unpack(key)
    return policy, Prefix(PolicyKind(kind), content, bits - _EXACT, _POLICY_VALUE.unpack(value)[0])


def address(one: Address | None) -> bytes:
    """Returns 16 bytes, IPv4 as ::ffff:a.b.c.d; zeros for none."""
    if one is None:
        return bytes(ADDRESS)
    return one.packed if one.version == 6 else _IPV4 + one.packed


def parse(data: bytes) -> Address | None:
    """Returns the address in 16 bytes; None for zeros."""
    if not any(data):
        return None
    mapped = IPv6Address(data)
    return ip_address(data[12:]) if mapped.ipv4_mapped else mapped


def cookie(number: int) -> bytes:
    return _COOKIE.pack(number)


def uncookie(data: bytes) -> int:
    number: int = _COOKIE.unpack(data)[0]
    return number


def ztunnel(cgroup: int, tgid: int) -> bytes:
    return _KEY.pack(cgroup, tgid, 0)


def unztunnel(data: bytes) -> tuple[int, int]:
    """Returns (cgroup id, tgid)."""
    cgroup, tgid, _ = _KEY.unpack(data)
    return cgroup, tgid


def listener(cookie: int, role: int, slot: int) -> bytes:
    return _KEY.pack(cookie, role, slot)


def non_tcp_key(cookie: int, direction: int) -> bytes:
    """Encodes the key of a pod's counter; `direction`: 0 outbound, 1 inbound."""
    return _KEY.pack(cookie, direction, 0)


def traffic(data: bytes) -> tuple[int, int]:
    """Returns (packets, bytes)."""
    packets, size = _TRAFFIC.unpack(data)
    return packets, size
