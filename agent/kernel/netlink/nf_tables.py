# SPDX-License-Identifier: Apache-2.0
"""nf_tables over nfnetlink: dumps, the generation, and batches that commit in one transaction.

A batch carries the generation it was made
from, so that it is a compare-and-swap: the kernel answers ERESTART to a stale one.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

from agent.core.errors import KernelError
from agent.core.text import printable
from agent.core.wire.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    attribute,
    message,
    messages,
    unpack_be,
    unpack_text,
)
from agent.core.wire.nftables import (
    BATCH_BEGIN,
    BATCH_END,
    BATCH_GENID,
    GETCHAIN,
    GETGEN,
    NETLINK_NETFILTER,
    NFGENMSG,
    SUBSYSTEM,
    Chain,
    Command,
    Gen,
    fields,
)
from agent.kernel import exec
from agent.kernel.netlink.netlink_socket import SO_RCVBUFFORCE, SO_SNDBUFFORCE, NetlinkSocket, raise_for

_LENGTH = struct.Struct("=I")  # the first field of nlmsghdr


class NftSocket(NetlinkSocket):
    """Speaks nf_tables in the namespace it was opened in. Owned tables belong to its port."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        # A whole rule set is one datagram of some 6 kB; large ones of others must fit when we read them.
        for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 1 << 20)

    def generation(self) -> int:
        """Returns the generation. It grows by one with each transaction in the namespace, of any process and family."""
        operation = "read nf_tables generation"
        sequence = self.next_sequence()
        self.socket.send(message(GETGEN, NLM_F_REQUEST, sequence, NFGENMSG.pack(0, 0, 0)))
        while True:  # without an acknowledgement behind it: this is asked more often than anything else
            for answer in messages(self.receive(operation)):
                if answer.sequence != sequence:
                    continue
                if answer.kind == NLMSG_ERROR:
                    raise_for(operation, answer)
                return unpack_be(fields(answer.body).get(Gen.ID))

    def dumped(self, kind: int, family: int = 0, body: bytes = b"", most: int = 1 << 30) -> tuple[bytes, bool]:
        """Dumps tables, chains or rules, of all families by default: the messages as they come, in a row.

        Also whether that is all: what is beyond `most` bytes is received, but not kept. A table that does not exist
        dumps as nothing.
        Not for a namespace that may change meanwhile, unless the generation is compared afterwards.
        """
        operation = "read nf_tables"
        sequence = self.next_sequence()
        self.socket.send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, NFGENMSG.pack(family, 0, 0) + body))
        parts: list[bytes] = []
        size, kept = 0, 0
        while True:
            data = self.receive(operation)
            _, kind, _, answered, _ = HEADER.unpack_from(data)
            if answered != sequence:
                continue  # a late answer to a request that was given up
            if kind == NLMSG_ERROR:
                raise_for(operation, next(messages(data)), (errno.ENOENT,))
                return b"", True
            offset, kind = _last(data)
            size += len(data)
            if size <= most:
                kept += len(data)
                parts.append(data if kind != NLMSG_DONE else data[:offset])
            if kind == NLMSG_DONE:
                return b"".join(parts), kept == size

    def get(self, kind: int, family: int, body: bytes) -> bytes:
        """Returns one table or chain, as in a dump; empty when it does not exist."""
        messages = self.dump(kind, family, body, 0)
        return b"".join(message(one.kind, 0, one.sequence, one.body) for one in messages)

    def dump(self, kind: int, family: int, body: bytes = b"", flags: int = NLM_F_DUMP) -> list[Message]:
        """Dumps tables, chains or rules of a family, with `flags` 0 reads the one that `body` names.

        What does not exist is read as nothing.
        """
        request = NFGENMSG.pack(family, 0, 0) + body
        return self.request("read nf_tables", kind, flags, request, fine=(errno.ENOENT,))

    def chains(self) -> list[tuple[str, str]]:
        """Returns (table, chain) of each chain in the namespace."""
        chains = (fields(one.body) for one in self.dump(GETCHAIN, 0))
        return [(unpack_text(parts.get(Chain.TABLE)), unpack_text(parts.get(Chain.NAME))) for parts in chains]

    def commit(self, operation: str, commands: Sequence[Command], generation: int | None) -> None:
        """Sends all commands as one transaction.

        Raises StaleError when the rule set is no longer of `generation`, KernelError when refused; then
        nothing was changed.
        """
        first = self.next_sequence()
        begin = NFGENMSG.pack(0, 0, SUBSYSTEM)
        if generation is not None:
            begin += attribute(BATCH_GENID, generation)
        parts = [message(BATCH_BEGIN, NLM_F_REQUEST, first, begin)]
        sequence = first
        for index, command in enumerate(commands):
            sequence = self.next_sequence()
            flags = NLM_F_REQUEST | command.flags | (NLM_F_ACK if index == len(commands) - 1 else 0)
            body = NFGENMSG.pack(command.family, 0, 0) + command.body
            parts.append(message(command.kind, flags, sequence, body))
        end = NFGENMSG.pack(0, 0, SUBSYSTEM)
        parts.append(message(BATCH_END, NLM_F_REQUEST, self.next_sequence(), end))
        try:
            self.socket.send(b"".join(parts))
        except OSError as error:
            raise KernelError(operation, error.errno or 0, error.strerror or "") from error
        self._settle(operation, first, sequence)

    def _settle(self, operation: str, first: int, last: int) -> None:
        failed: KernelError | None = None
        while True:
            for answer in messages(self.receive(operation)):
                if answer.kind != NLMSG_ERROR or not first <= answer.sequence <= last:
                    continue
                try:
                    raise_for(operation, answer)
                except KernelError as error:
                    failed = failed or error
                if answer.sequence in (first, last):  # a refused batch ends at its begin message
                    if failed is not None:
                        raise failed
                    return


def _last(datagram: bytes) -> tuple[int, int]:
    """Returns the offset and type of the last message: the end of a dump, which some kernels put behind the data."""
    end = len(datagram) - HEADER.size
    at = 0
    offset = 0
    length_at = _LENGTH.unpack_from
    while at <= end:
        offset = at
        at += max(HEADER.size, (length_at(datagram, at)[0] + 3) & ~3)
    return offset, HEADER.unpack_from(datagram, offset)[1]


def committer(body: bytes) -> str:
    """Returns who committed a NEWGEN notification, like "nft[4711]"; "" for a program that the agent started."""
    parts = fields(body)
    pid = unpack_be(parts.get(Gen.PROC_PID))
    if exec.is_ours(pid):
        return ""
    return f"{printable(unpack_text(parts.get(Gen.PROC_NAME))) or 'unknown'}[{pid}]"
