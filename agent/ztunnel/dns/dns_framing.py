# SPDX-License-Identifier: Apache-2.0
"""Cuts a TCP stream into DNS messages, each of which follows its length (RFC 1035, 4.2.2). Pure.

A short message is held until it is whole. A longer one is passed on in pieces, as it arrives. One that has not one
question, as every query and update has, is another protocol's: it is taken for a message without end.
"""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

LENGTH: Final = 2  # bytes before each message
_COUNT: Final = slice(LENGTH + 4, LENGTH + 6)  # of questions, after the id and the flags


class Piece(NamedTuple):
    """Bytes of one message, the first with its length. A message that is `first` and `last` is whole."""

    data: bytes
    first: bool
    last: bool


class DnsFraming:
    """One direction of a connection."""

    __slots__ = ("_held", "_left", "_longest", "_queries")

    def __init__(self, longest: int, *, queries: bool) -> None:
        """Takes the length from which on a message is not held. Answers, unlike queries, may repeat no question."""
        self._queries = queries
        self._longest = LENGTH + longest
        self._held = b""
        self._left = 0  # bytes to come of a message that was returned in part

    @property
    def endless(self) -> bool:
        """Returns True if this is another protocol."""
        return self._left > 1 << 16

    def pass_all(self) -> None:
        """Takes all that follows for another protocol."""
        self._left = sys.maxsize

    def cut(self, data: bytes) -> list[Piece]:
        """Returns the pieces that `data` completes."""
        data = self._held + data
        pieces = []
        at = 0
        while (have := len(data) - at) >= LENGTH or (have and self._left):
            if self._left:
                size = min(self._left, have)
                self._left -= size
                pieces.append(Piece(data[at : at + size], False, not self._left))
            else:
                size = LENGTH + int.from_bytes(data[at : at + LENGTH])
                if size <= have:
                    pieces.append(Piece(data[at : at + size], True, True))
                elif size < self._longest or have < _COUNT.stop:
                    break
                else:
                    foreign = self._queries and int.from_bytes(data[at:][_COUNT]) != 1
                    self._left = sys.maxsize if foreign else size - have
                    size = have
                    pieces.append(Piece(data[at:], True, False))
            at += size
        self._held = data[at:]
        return pieces


def framed(message: bytes) -> bytes:
    """Returns the message after its length."""
    return len(message).to_bytes(LENGTH) + message
