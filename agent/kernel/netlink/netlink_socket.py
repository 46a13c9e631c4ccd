# SPDX-License-Identifier: Apache-2.0
"""A netlink socket that asks and waits for its answers."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import sys
import threading
from collections.abc import Container, Iterable, Iterator

from agent.core.errors import KernelError, StaleError
from agent.core.wire.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    attributes,
    message,
    messages,
)
from agent.kernel import socket_filter

SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK = 270, 11, 10
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
_SO_RCVTIMEO = 20  # asm-generic/socket.h


class _Buffer(threading.local):
    """A thread's receive buffer: a new one for each datagram would cost more than most requests."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 18)


_buffer = _Buffer()


class NetlinkSocket:
    """Sends requests and waits for the answers. For one thread at a time, in the namespace that it was made in.

    `torn`: a dump that changes each time it is read is used as it was read last. Else that is an error.
    """

    torn = False

    def __init__(self, family: int, *, groups: Iterable[int] = (), seconds: float = 5, only: bytes = b"") -> None:
        """Joins multicast `groups`; `only` is a filter of core.sockfilter on what is received."""
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self.socket.bind((0, 0))
            # The kernel's own time limit; Python's asks poll(2) before each call.
            limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVTIMEO, limit)
            self.socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self.socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            if only:
                socket_filter.attach(self.socket, only)
            for group in groups:
                self.socket.setsockopt(SOL_NETLINK, 1, group)  # NETLINK_ADD_MEMBERSHIP
            self.port: int = self.socket.getsockname()[0]
        except BaseException:
            self.socket.close()
            raise
        self._sequence = itertools.count(1)

    def next_sequence(self) -> int:
        return next(self._sequence) & 0xFFFFFFFF

    def request(
        self,
        operation: str,
        kind: int,
        flags: int,
        body: bytes,
        *,
        most: int = sys.maxsize,
        fine: Container[int] = (),
    ) -> list[Message]:
        """Sends one request and returns the first `most` messages of its answer, without the final acknowledgement.

        All of a dump is received. One that changed meanwhile is requested again. Raises KernelError in the kernel's
        words, unless the error's number is in `fine`, such as ENOENT: then the answer is empty.
        """
        answers: list[Message] = []
        for _ in range(3 if self.torn else 20):
            sequence = self.next_sequence()
            final = NLM_F_DUMP if flags & NLM_F_DUMP == NLM_F_DUMP else NLM_F_ACK
            self.socket.send(message(kind, NLM_F_REQUEST | flags | final, sequence, body))
            answers = []
            changed = 0
            for answer in self._answers(operation, sequence, fine):
                changed |= answer.flags & NLM_F_DUMP_INTR
                if len(answers) < most:
                    answers.append(answer)
            if not changed:
                return answers
        if self.torn:
            return answers
        raise StaleError(operation, errno.EINTR, "kept changing while it was read")

    def _answers(self, operation: str, sequence: int, fine: Container[int]) -> Iterator[Message]:
        while True:
            for answer in messages(self.receive(operation)):
                if answer.sequence != sequence:
                    continue  # a late answer to a request that was given up
                if answer.kind == NLMSG_DONE:
                    return
                if answer.kind == NLMSG_ERROR:
                    raise_for(operation, answer, fine)
                    return
                yield answer

    def receive(self, operation: str) -> bytes:
        """Returns one datagram. Raises KernelError, also when none comes in time."""
        buffer = _buffer.bytes
        try:
            return bytes(memoryview(buffer)[: self.socket.recv_into(buffer)])
        except BlockingIOError:
            raise KernelError(operation, errno.ETIMEDOUT, "the kernel did not answer") from None
        except OSError as error:
            raise KernelError(operation, error.errno or 0, error.strerror or "") from error

    def close(self) -> None:
        self.socket.close()


def raise_for(operation: str, answer: Message, fine: Container[int] = ()) -> None:
    """Turns a negative acknowledgement into KernelError, with the kernel's extended text when it sent one."""
    number = -struct.unpack_from("=i", answer.body)[0]
    if not number or number in fine:
        return
    cause = os.strerror(number)
    if answer.flags & 0x200:  # NLM_F_ACK_TLVS: error code, the request's header, then attributes
        for kind, payload in attributes(answer.body[4 + HEADER.size :]):
            if kind == 1:
                cause += f" ({payload.rstrip(bytes(1)).decode(errors='replace')})"
    stale = number == errno.ERESTART
    raise (StaleError if stale else KernelError)(operation, number, cause)
