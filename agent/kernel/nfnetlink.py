"""nf_tables over nfnetlink: dumps, the generation, and batches that commit in one transaction.

Constants are of linux/netfilter/nf_tables.h and nfnetlink.h. A batch carries the generation it was made
from, so that it is a compare-and-swap: the kernel answers ERESTART to a stale one.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from agent.core.errors import KernelError
from agent.kernel import netlink
from agent.kernel.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Message, NetlinkSocket

NETLINK_NETFILTER = 12
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES

_SUBSYSTEM = 10 << 8
NEWTABLE, GETTABLE, DELTABLE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
NEWCHAIN, GETCHAIN, DELCHAIN = _SUBSYSTEM | 3, _SUBSYSTEM | 4, _SUBSYSTEM | 5
NEWRULE, GETRULE, DELRULE = _SUBSYSTEM | 6, _SUBSYSTEM | 7, _SUBSYSTEM | 8
NEWGEN, GETGEN = _SUBSYSTEM | 15, _SUBSYSTEM | 16
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource id


@dataclass(frozen=True, slots=True)
class Command:
    """One message of a batch: a type such as NEWRULE, NLM_F_* flags, the family and the attributes."""

    kind: int
    flags: int
    family: int
    body: bytes


class NftSocket(NetlinkSocket):
    """Speaks nf_tables in the namespace it was opened in. Owned tables belong to its port."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        # A whole rule set is one datagram of some 6 kB; large ones of others must fit when we read them.
        for option in (netlink.SO_RCVBUFFORCE, netlink.SO_SNDBUFFORCE):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 1 << 20)

    def generation(self) -> int:
        for answer in self.request("read nf_tables generation", GETGEN, 0, _GENERIC.pack(0, 0, 0)):
            for kind, payload in netlink.attributes(answer.body[4:]):
                if kind == 1:
                    return int.from_bytes(payload)
        return 0

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[Message]:
        """Tables, chains or rules of a family; a table that does not exist dumps as nothing."""
        try:
            return self.request("read nf_tables", kind, NLM_F_DUMP, _GENERIC.pack(family, 0, 0) + body)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def commit(self, operation: str, commands: Sequence[Command], generation: int | None) -> None:
        """Sends all commands as one transaction.

        Raises StaleError when the rule set is no longer of `generation`, KernelError when refused; then
        nothing was changed.
        """
        first = self.next_sequence()
        begin = _GENERIC.pack(0, 0, 10)
        if generation is not None:
            begin += netlink.attribute(1, generation)
        parts = [netlink.message(_BATCH_BEGIN, NLM_F_REQUEST, first, begin)]
        sequence = first
        for index, command in enumerate(commands):
            sequence = self.next_sequence()
            flags = NLM_F_REQUEST | command.flags | (NLM_F_ACK if index == len(commands) - 1 else 0)
            body = _GENERIC.pack(command.family, 0, 0) + command.body
            parts.append(netlink.message(command.kind, flags, sequence, body))
        end = _GENERIC.pack(0, 0, 10)
        parts.append(netlink.message(_BATCH_END, NLM_F_REQUEST, self.next_sequence(), end))
        try:
            self.socket.send(b"".join(parts))
        except OSError as error:
            raise KernelError(operation, error.errno or 0, error.strerror or "") from error
        self._settle(operation, first, sequence)

    def _settle(self, operation: str, first: int, last: int) -> None:
        failed: KernelError | None = None
        while True:
            for answer in netlink.messages(self.receive(operation)):
                if answer.kind != netlink.NLMSG_ERROR or not first <= answer.sequence <= last:
                    continue
                try:
                    netlink.raise_for(operation, answer)
                except KernelError as error:
                    failed = failed or error
                if answer.sequence in (first, last):  # a refused batch ends at its begin message
                    if failed is not None:
                        raise failed
                    return
