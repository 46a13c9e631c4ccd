"""ipset over nfnetlink: only hash:ip sets, with comments where the kernel has them.

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
from functools import lru_cache

from agent.core.errors import KernelError
from agent.core.netlink import NLM_F_DUMP, NLM_F_EXCL, attribute, attributes, nested
from agent.core.nftables import NETLINK_NETFILTER
from agent.kernel.netlink import NetlinkSocket

_SUBSYSTEM = 6 << 8
_PROTOCOL, _CREATE, _DESTROY, _LIST, _ADD, _DEL, _TYPE = (_SUBSYSTEM | number for number in (1, 2, 3, 7, 9, 10, 13))
# Attributes of a command; of its data; of an element.
_A_PROTOCOL, _A_NAME, _A_TYPE, _A_REVISION, _A_FAMILY, _A_DATA, _A_ADT, _A_LEAST = 1, 2, 3, 4, 5, 7, 8, 10
_D_IP, _D_FLAGS, _D_COMMENT = 1, 8, 26
_WITH_COMMENT = 1 << 4
_NET_ORDER = 0x4000  # NLA_F_NET_BYTEORDER: without it the kernel takes neither addresses nor numbers
_COMMENTS_SINCE = 3  # revision of hash:ip
_NFPROTO = {4: socket.AF_INET, 6: socket.AF_INET6}
_MISSING, _REFERENCED, _BUSY_SECONDS = 4103, 4100, 2.0  # IPSET_ERR_EXIST of a DEL; IPSET_ERR_BUSY
_WORDS = {
    4097: "the kernel speaks another ipset protocol",
    4098: "the kernel has no set type hash:ip; it needs ip_set_hash_ip",
    4099: "there are as many sets as the kernel allows",
    _REFERENCED: "a rule still uses it",
    4102: "a set of this name has another type",
    4109: "an IPv4 address was expected",
    4110: "an IPv6 address was expected",
    4112: "the set holds no comments",
    4352: "the set is full",
}


@dataclass(frozen=True, slots=True)
class IpSet:
    """One set as the kernel holds it. `members`: address -> comment, "" without one."""

    name: str
    kind: str
    family: int  # 4 or 6
    comments: bool
    members: Mapping[str, str]


class IpsetSocket(NetlinkSocket):
    """Speaks ipset in the namespace it was opened in; asks the kernel for nothing until it is used."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        self._spoken = 0

    def read(self, name: str) -> IpSet | None:
        """The set with all members; None when there is none of that name."""
        try:
            answers = self._ask("read", _LIST, name, NLM_F_DUMP)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        kind, family, flags, members = "", 4, 0, dict[str, str]()
        for answer in answers:
            parts = dict(attributes(answer[4:]))
            if _A_TYPE in parts:
                kind = parts[_A_TYPE].rstrip(b"\0").decode(errors="replace")
                family = 6 if parts.get(_A_FAMILY) == bytes([socket.AF_INET6]) else 4
                flags = int.from_bytes(dict(attributes(parts.get(_A_DATA, b""))).get(_D_FLAGS, b""))
            members.update(_member(element) for _, element in attributes(parts.get(_A_ADT, b"")))
        members.pop("", None)
        return IpSet(name, kind, family, bool(flags & _WITH_COMMENT), members)

    def comments(self) -> bool:
        """Whether this kernel's hash:ip can hold comments."""
        body = attribute(_A_TYPE, "hash:ip") + attribute(_A_FAMILY, bytes([socket.AF_INET]))
        (answer,) = self._request("ask for the type hash:ip", _TYPE, 0, body)
        return dict(attributes(answer[4:])).get(_A_REVISION, b"\0")[0] >= _COMMENTS_SINCE

    def create(self, name: str, family: int, *, comments: bool) -> None:
        """A hash:ip set; one that is already there is an error."""
        data = [attribute(_D_FLAGS | _NET_ORDER, _WITH_COMMENT)] if comments else []
        more = attribute(_A_TYPE, "hash:ip") + attribute(_A_REVISION, bytes([_COMMENTS_SINCE if comments else 0]))
        more += attribute(_A_FAMILY, bytes([_NFPROTO[family]])) + nested(_A_DATA, *data)
        self._ask("create", _CREATE, name, NLM_F_EXCL, more)

    def add(self, name: str, address: str, comment: str = "") -> None:
        """Adds the address, or gives it another comment."""
        data = [_address(address)] + ([attribute(_D_COMMENT, comment)] if comment else [])
        self._ask(f"add {address} to", _ADD, name, 0, nested(_A_DATA, *data))

    def delete(self, name: str, address: str) -> None:
        """An address that is not there is fine."""
        try:
            self._ask(f"delete {address} from", _DEL, name, 0, nested(_A_DATA, _address(address)))
        except KernelError as error:
            if error.errno != _MISSING:
                raise

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
                if error.errno != _REFERENCED or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # the kernel tells nobody when a set's last user is gone

    def _ask(self, verb: str, kind: int, name: str, flags: int, more: bytes = b"") -> list[bytes]:
        return self._request(f"{verb} set {name}", kind, flags, attribute(_A_NAME, name) + more)

    def _request(self, operation: str, kind: int, flags: int, body: bytes) -> list[bytes]:
        self._spoken = self._spoken or self._protocol()
        return self._send(operation, kind, flags, attribute(_A_PROTOCOL, bytes([self._spoken])) + body)

    def _protocol(self) -> int:
        """7, or 6 of kernels before 4.18."""
        (answer,) = self._send("ask for ipset's protocol", _PROTOCOL, 0, attribute(_A_PROTOCOL, bytes([6])))
        parts = dict(attributes(answer[4:]))
        least, most = parts.get(_A_LEAST, b"\6")[0], parts.get(_A_PROTOCOL, b"\6")[0]
        if least > 7 or most < 6:
            raise KernelError("speak ipset", errno.EPROTO, f"the kernel's protocol is {least} to {most}, ours 6 to 7")
        return min(7, most)

    def _send(self, operation: str, kind: int, flags: int, body: bytes) -> list[bytes]:
        header = struct.pack(">BBH", socket.AF_INET, 0, 0)
        try:
            return [answer.body for answer in self.request(operation, kind, flags, header + body)]
        except KernelError as error:
            words = _WORDS.get(error.errno)
            raise (KernelError(operation, error.errno, words) if words else error) from None


def _address(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return nested(_D_IP, attribute((1 if address.version == 4 else 2) | _NET_ORDER, address.packed))


# The same entries are read again and again: what one says is worked out once.
@lru_cache(maxsize=4096)
def _member(element: bytes) -> tuple[str, str]:
    parts = dict(attributes(element))
    for _, raw in attributes(parts.get(_D_IP, b"")):
        if len(raw) in (4, 16):
            return str(ipaddress.ip_address(raw)), parts.get(_D_COMMENT, b"").rstrip(b"\0").decode(errors="replace")
    return "", ""
