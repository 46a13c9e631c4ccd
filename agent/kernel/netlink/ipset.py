"""ipset over nfnetlink: reads hash:ip sets and destroys them.

Numbers of linux/netfilter/ipset/ip_set.h and net/netfilter/ipset/ip_set_core.c.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from agent.core.errors import KernelError
from agent.core.wire.netlink import NLM_F_DUMP, attribute, attributes
from agent.core.wire.nftables import NETLINK_NETFILTER
from agent.kernel.netlink.socket import NetlinkSocket

_SUBSYSTEM = 6 << 8
_DESTROY, _LIST = (_SUBSYSTEM | number for number in (3, 7))
_A_PROTOCOL, _A_NAME, _A_TYPE, _A_FAMILY, _A_ADT = 1, 2, 3, 5, 8
_D_IP, _D_COMMENT = 1, 26
_PROTOCOL = 6  # what every kernel speaks; 7 of 4.18 adds nothing that is used here
_REFERENCED = 4100  # IPSET_ERR_BUSY
_BUSY_SECONDS = 2.0


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
        """The set with all members; None when there is none of that name."""
        try:
            answers = self._ask("read", _LIST, name, NLM_F_DUMP)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        kind = ""
        family = 4
        members = dict[str, str]()
        for answer in answers:
            parts = dict(attributes(answer[4:]))
            if _A_TYPE in parts:
                kind = parts[_A_TYPE].rstrip(b"\0").decode(errors="replace")
                family = 6 if parts.get(_A_FAMILY) == bytes([socket.AF_INET6]) else 4
            members.update(_member(element) for _, element in attributes(parts.get(_A_ADT, b"")))
        members.pop("", None)
        return IpSet(name, kind, family, members)

    def destroy(self, name: str) -> None:
        """Waits up to two seconds for rules that were deleted just now: nf_tables lets go of sets a little later."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._ask("destroy", _DESTROY, name, 0)
                return
            except KernelError as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno != _REFERENCED:
                    raise
                if time.monotonic() > deadline:
                    raise KernelError(f"destroy set {name}", error.errno, "a rule still uses it") from None
                time.sleep(0.01)  # the kernel does not report when a set's last user is gone

    def _ask(self, verb: str, kind: int, name: str, flags: int) -> list[bytes]:
        body = struct.pack(">BBH", socket.AF_INET, 0, 0)
        body += attribute(_A_PROTOCOL, bytes([_PROTOCOL])) + attribute(_A_NAME, name)
        return [answer.body for answer in self.request(f"{verb} set {name}", kind, flags, body)]


def _member(element: bytes) -> tuple[str, str]:
    parts = dict(attributes(element))
    for _, raw in attributes(parts.get(_D_IP, b"")):
        if len(raw) in (4, 16):
            return str(ipaddress.ip_address(raw)), parts.get(_D_COMMENT, b"").rstrip(b"\0").decode(errors="replace")
    return "", ""
