"""Netlink messages and attributes, and a socket that waits for its answers.

Header: length u32, type u16, flags u16, sequence u32, port u32, in host order; attributes: length u16,
type u16, payload, padded to four bytes (linux/netlink.h).
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.core.errors import KernelError, StaleError

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK = 270, 11, 10
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32


@dataclass(frozen=True, slots=True)
class Message:
    """One received message: type, flags, sequence and port of its header, and the body behind it."""

    kind: int
    flags: int
    sequence: int
    port: int
    body: bytes


def attribute(kind: int, payload: bytes | int | str) -> bytes:
    """One padded attribute. An int is a big-endian u32 (nf_tables' order), a str is zero-terminated."""
    if isinstance(payload, int):
        payload = struct.pack(">I", payload)
    elif isinstance(payload, str):
        payload = payload.encode() + b"\0"
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type without flag bits, payload) of each attribute; stops at a torn tail."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield kind & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def messages(datagram: bytes) -> Iterator[Message]:
    offset = 0
    while offset + HEADER.size <= len(datagram):
        length, kind, flags, sequence, port = HEADER.unpack_from(datagram, offset)
        if length < HEADER.size or offset + length > len(datagram):
            return
        yield Message(kind, flags, sequence, port, datagram[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


class NetlinkSocket:
    """Asks and waits. Not for two threads at once; belongs to the namespace it was made in."""

    def __init__(self, family: int, *, groups: Iterable[int] = (), seconds: float = 5) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self.socket.bind((0, 0))
            self.socket.settimeout(seconds)
            self.socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self.socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            for group in groups:
                self.socket.setsockopt(SOL_NETLINK, 1, group)  # NETLINK_ADD_MEMBERSHIP
            self.port: int = self.socket.getsockname()[0]
        except BaseException:
            self.socket.close()
            raise
        self._sequence = itertools.count(1)

    def next_sequence(self) -> int:
        return next(self._sequence) & 0xFFFFFFFF

    def request(self, operation: str, kind: int, flags: int, body: bytes) -> list[Message]:
        """Sends one request and returns what it answered, without the final acknowledgement.

        A dump that changed under the reader is asked for again. Raises KernelError in the kernel's words.
        """
        for _ in range(20):
            sequence = self.next_sequence()
            final = NLM_F_DUMP if flags & NLM_F_DUMP == NLM_F_DUMP else NLM_F_ACK
            self.socket.send(message(kind, NLM_F_REQUEST | flags | final, sequence, body))
            answers = list(self._answers(operation, sequence))
            if not any(answer.flags & NLM_F_DUMP_INTR for answer in answers):
                return answers
        raise StaleError(operation, errno.EINTR, "kept changing while it was read")

    def _answers(self, operation: str, sequence: int) -> Iterator[Message]:
        while True:
            for answer in messages(self.receive(operation)):
                if answer.sequence != sequence:
                    continue  # a late answer to a request that was given up
                if answer.kind == NLMSG_DONE:
                    return
                if answer.kind == NLMSG_ERROR:
                    raise_for(operation, answer)
                    return
                yield answer

    def receive(self, operation: str) -> bytes:
        try:
            return self.socket.recv(1 << 18)
        except TimeoutError:
            raise KernelError(operation, errno.ETIMEDOUT, "the kernel did not answer") from None
        except OSError as error:
            raise KernelError(operation, error.errno or 0, error.strerror or "") from error

    def close(self) -> None:
        self.socket.close()


def raise_for(operation: str, answer: Message) -> None:
    """Turns a negative acknowledgement into KernelError, with the kernel's extended text when it sent one."""
    number = -struct.unpack_from("=i", answer.body)[0]
    if not number:
        return
    words = os.strerror(number)
    if answer.flags & 0x200:  # NLM_F_ACK_TLVS: error code, the request's header, then attributes
        for kind, payload in attributes(answer.body[4 + HEADER.size :]):
            if kind == 1:
                words += f" ({payload.rstrip(bytes(1)).decode(errors='replace')})"
    stale = number == errno.ERESTART
    raise (StaleError if stale else KernelError)(operation, number, words)
