# SPDX-License-Identifier: Apache-2.0
"""The parts of a DNS message that a relay needs (RFC 1035, 4.1). Pure."""

from __future__ import annotations

import struct

from agent.core.wire.dns_message import question_end

_HEADER = struct.Struct(">2sHHHHH")  # id, flags, number of questions, answers, authorities, additional records
_ANSWER, _RECURSION_AVAILABLE, _CODE = 0x8000, 0x0080, 0x000F
_SERVER_FAILED, _NAME_ERROR = 2, 3
_KEPT = 0x7900  # operation code and "recursion desired"
_FLAGS_END = 4  # bytes


def question(message: bytes) -> bytes:
    """Returns the message up to the end of its one question; b"" if it is not a query, or not DNS."""
    if len(message) < _HEADER.size:
        return b""
    _, flags, questions, _, _, _ = _HEADER.unpack_from(message)
    if flags & _ANSWER or questions != 1:
        return b""
    return message[: question_end(message)]


def is_answer(message: bytes) -> bool:
    """Returns True for an answer; the beginning of a message, with its flags, is enough."""
    return len(message) >= _FLAGS_END and bool(message[2] & _ANSWER >> 8)


def is_usable(answer: bytes) -> bool:
    """Returns True if an answer has no error code, or the one for a name that does not exist."""
    return answer[3] & _CODE in (0, _NAME_ERROR)


def failure(asked: bytes) -> bytes:
    """Returns the answer SERVFAIL to a result of `question`: a resolver library then asks its next server at once."""
    number, flags, *_ = _HEADER.unpack_from(asked)
    flags = _ANSWER | flags & _KEPT | _RECURSION_AVAILABLE | _SERVER_FAILED
    return _HEADER.pack(number, flags, 1, 0, 0, 0) + asked[_HEADER.size :]
