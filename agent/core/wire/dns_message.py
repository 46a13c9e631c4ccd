# SPDX-License-Identifier: Apache-2.0
"""DNS messages: questions, codes and addresses (RFC 1035, 4.1). Pure; input may be hostile, or cut off."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from agent.core.text import printable

HEADER: Final = struct.Struct(">HHHHHH")  # id, flags, number of questions, answers, authorities, additional records
ANSWER: Final = 0x8000
_OPERATION, _CODE = 0x7800, 0x000F
_MOST_NAME, _MOST_LABEL, _POINTER = 255, 63, 0xC0
_TYPE_AND_CLASS: Final = 4
_RECORD = struct.Struct(">HHIH")  # type, class, TTL, length
_ADDRESS: Final = {(1, 4), (28, 16)}  # type and length of A, AAAA
_MOST_RECORDS: Final = 32  # that are read of one message
_TYPES: Final = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV", 64: "SVCB",
    65: "HTTPS", 255: "ANY",
}  # fmt: skip
_CODES: Final = ("NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED")


# By position: one is made of every packet, and keywords take longer.
@dataclass(frozen=True, slots=True)
class DnsMessage:
    """A query, or an answer to one. `name` is printable, without the last dot, and "" if an answer repeats no question.

    `addresses` are those of an answer, `ttl` the least time in seconds for which they are valid.
    """

    number: int
    is_answer: bool
    name: str
    kind: int
    code: int
    addresses: tuple[str, ...] = ()
    ttl: int = 0


def type_word(kind: int) -> str:
    return _TYPES.get(kind, f"TYPE{kind}")


def code_word(code: int) -> str:
    return _CODES[code] if code < len(_CODES) else f"RCODE{code}"


def question_end(message: bytes) -> int:
    """Returns the length of the message up to the end of its first question; 0 if that is malformed or cut off."""
    at = HEADER.size
    while at < min(len(message), HEADER.size + _MOST_NAME):
        label = message[at]
        at += 1 + label
        if not label:
            end = at + _TYPE_AND_CLASS
            return end if end <= len(message) else 0
        if label > _MOST_LABEL:
            break
    return 0


def read(message: bytes) -> DnsMessage | None:
    """Returns None for what is no query with one question, nor an answer to one."""
    if len(message) < HEADER.size:
        return None
    number, flags, questions, answers, _, _ = HEADER.unpack_from(message)
    is_answer = bool(flags & ANSWER)
    if flags & _OPERATION or questions > 1 or not (questions or is_answer):
        return None
    if not questions:
        return DnsMessage(number, is_answer, "", 0, flags & _CODE)
    end = question_end(message)
    if not end:
        return None
    name = _name(message)
    kind = int.from_bytes(message[end - 4 : end - 2])
    if not is_answer:
        return DnsMessage(number, is_answer, name, kind, 0)
    addresses, ttl = _addresses(message, end, min(answers, _MOST_RECORDS))
    return DnsMessage(number, is_answer, name, kind, flags & _CODE, addresses, ttl)


def _name(message: bytes) -> str:
    labels = []
    at = HEADER.size
    while size := message[at]:
        labels.append(message[at + 1 : at + 1 + size].decode("ascii", "backslashreplace"))
        at += 1 + size
    return printable(".".join(labels)) or "."


def _addresses(message: bytes, at: int, count: int) -> tuple[tuple[str, ...], int]:
    """Returns the addresses in `count` records, and their least TTL; those before the message is cut off."""
    found = list[str]()
    least = 0
    for _ in range(count):
        at = _name_end(message, at)
        if not at or at + _RECORD.size > len(message):
            break
        kind, _, ttl, size = _RECORD.unpack_from(message, at)
        at += _RECORD.size
        if (kind, size) in _ADDRESS and at + size <= len(message):
            least = min(least, ttl) if found else ttl
            found.append(str(ip_address(message[at : at + size])))
        at += size
    return tuple(found), least


def _name_end(message: bytes, at: int) -> int:
    """Returns where the record's name that begins at `at` ends; 0 if it is malformed."""
    while at < len(message):
        label = message[at]
        if label & _POINTER == _POINTER:
            return at + 2
        at += 1 + label
        if not label:
            return at
        if label > _MOST_LABEL:
            break
    return 0
