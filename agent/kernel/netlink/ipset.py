# SPDX-License-Identifier: Apache-2.0
"""ipset over nfnetlink: reads hash:ip sets and destroys them.

Numbers of linux/netfilter/ipset/ip_set.h and net/netfilter/ipset/ip_set_core.c.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from agent.core.errors import KernelError
from agent.core.wire.netlink import NLM_F_DUMP, attribute, attributes, unpack_text
from agent.core.wire.nftables import NETLINK_NETFILTER, NFGENMSG, fields
from agent.kernel.netlink.netlink_socket import NetlinkSocket

_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
DESTROY, LIST = _SUBSYSTEM | 3, _SUBSYSTEM | 7
_PROTOCOL = 6  # what every kernel speaks; 7 of 4.18 adds nothing that is used here
_REFERENCED = 4100  # IPSET_ERR_BUSY
_BUSY_SECONDS = 2.0


class Attribute(IntEnum):
    """IPSET_ATTR_*: attributes of a set."""

    PROTOCOL = 1
    SETNAME = 2
    TYPENAME = 3
    FAMILY = 5
    ADT = 8


class MemberAttribute(IntEnum):
    """IPSET_ATTR_*: attributes of a member, nested in Attribute.ADT."""

    IP = 1
    COMMENT = 26


@dataclass(frozen=True, slots=True)
class IpSet:
    """One set as the kernel holds it. `members`: address -> comment, "" without one."""

    name: str
    kind: str
    family: int  # 4 or 6
    members: Mapping[str, str]


class IpsetSocket(NetlinkSocket):
    """Speaks ipset in the namespace it was opened in; asks the kernel for nothing until it is used."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def read(self, name: str) -> IpSet | None:
        """Returns the set with all members; None when it does not exist."""
        answers = self._ask("read", LIST, name, NLM_F_DUMP)
        if not answers:
            return None
        kind = ""
        family = 4
        members = dict[str, str]()
        for answer in answers:
            parts = fields(answer)
            if Attribute.TYPENAME in parts:
                kind = unpack_text(parts[Attribute.TYPENAME])
                family = 6 if parts.get(Attribute.FAMILY) == bytes([socket.AF_INET6]) else 4
            members.update(_member(element) for _, element in attributes(parts.get(Attribute.ADT, b"")))
        members.pop("", None)
        return IpSet(name, kind, family, members)

    def destroy(self, name: str) -> None:
        """Waits up to two seconds for rules that were deleted just now: nf_tables lets go of sets a little later."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._ask("destroy", DESTROY, name, 0)
                return
            except KernelError as error:
                if error.errno != _REFERENCED:
                    raise
                if time.monotonic() > deadline:
                    raise KernelError(f"destroy set {name}", error.errno, "a rule still uses it") from None
                time.sleep(0.01)  # the kernel does not report when a set's last user is gone

    def _ask(self, verb: str, kind: int, name: str, flags: int) -> list[bytes]:
        body = NFGENMSG.pack(socket.AF_INET, 0, 0)
        body += attribute(Attribute.PROTOCOL, bytes([_PROTOCOL])) + attribute(Attribute.SETNAME, name)
        answers = self.request(f"{verb} set {name}", kind, flags, body, fine=(errno.ENOENT,))
        return [answer.body for answer in answers]


def _member(element: bytes) -> tuple[str, str]:
    parts = dict(attributes(element))
    for _, raw in attributes(parts.get(MemberAttribute.IP, b"")):
        if len(raw) in (4, 16):
            return str(ipaddress.ip_address(raw)), unpack_text(parts.get(MemberAttribute.COMMENT))
    return "", ""
