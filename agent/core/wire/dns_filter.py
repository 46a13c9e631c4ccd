# SPDX-License-Identifier: Apache-2.0
"""The socket filter that picks DNS out of a pod's packets: classic BPF, struct sock_filter of linux/filter.h. Pure.

It sees a packet from its IP header on. It takes UDP, and TCP segments with PSH (the last one of each message has it),
of a pod's own queries and their answers: what leaves to port 53 without ztunnel's mark, what comes from port 53, and
on lo what goes to ztunnel's port or comes from it. IPv6 extension headers and later fragments are left out.
"""

from __future__ import annotations

import struct
from typing import Final

from agent.core.names import DNS_PORT, MARK_MASK, ZTUNNEL_MARK

SNAPPED: Final = 1024  # bytes that are copied of a packet
PORT: Final = 53
_INSTRUCTION = struct.Struct("=HBBI")  # code, jump if true, jump if false, operand
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD = 0x30, 0x28, 0x20  # BPF_LD|BPF_ABS
_LOAD_BYTE_AT_X, _LOAD_HALF_AT_X = 0x50, 0x48  # BPF_LD|BPF_IND
_X_HEADER_LENGTH, _X_IS = 0xB1, 0x01  # BPF_LDX|BPF_B|BPF_MSH, BPF_LDX|BPF_IMM
_AND, _EQUAL, _SET, _RETURN, _JUMP = 0x54, 0x15, 0x45, 0x06, 0x05
_PACKET_TYPE, _MARK = 0xFFFFF000 + 4, 0xFFFFF000 + 20  # SKF_AD_OFF + SKF_AD_PKTTYPE, SKF_AD_MARK
_OUTGOING: Final = 4  # PACKET_OUTGOING
_TCP, _UDP, _PUSH = 6, 17, 8

Step = tuple[int, int | str, str, str]  # code, operand or label, label if true, label if false; "" is the next one
_TRANSPORT: Final[dict[str, list[Step]]] = {
    "": [(_LOAD_BYTE, 0, "", ""), (_AND, 0xF0, "", ""), (_EQUAL, 0x40, "", "six")],
    "four": [
        (_LOAD_HALF, 6, "", ""),
        (_SET, 0x1FFF, "drop", ""),  # a later fragment
        (_X_HEADER_LENGTH, 0, "", ""),
        (_LOAD_BYTE, 9, "", ""),
        (_JUMP, "transport", "", ""),
    ],
    "six": [(_EQUAL, 0x60, "", "drop"), (_X_IS, 40, "", ""), (_LOAD_BYTE, 6, "", "")],
    "transport": [
        (_EQUAL, _UDP, "ports", ""),
        (_EQUAL, _TCP, "", "drop"),
        (_LOAD_BYTE_AT_X, 13, "", ""),
        (_SET, _PUSH, "", "drop"),
    ],
}
_QUERY: Final[dict[str, list[Step]]] = {
    "query": [(_EQUAL, PORT, "", "drop"), (_LOAD_WORD, _MARK, "", ""), (_AND, MARK_MASK, "", "")],
    "mark": [(_EQUAL, ZTUNNEL_MARK, "drop", "take")],
    "take": [(_RETURN, SNAPPED, "", "")],
    "drop": [(_RETURN, 0, "", "")],
}
_ON_LO: Final[dict[str, list[Step]]] = _TRANSPORT | {
    "ports": [(_LOAD_HALF_AT_X, 0, "", ""), (_EQUAL, PORT, "take", ""), (_EQUAL, DNS_PORT, "take", "")],
    "to": [(_LOAD_HALF_AT_X, 2, "", ""), (_EQUAL, DNS_PORT, "take", "query")],
} | _QUERY  # fmt: skip
_ELSEWHERE: Final[dict[str, list[Step]]] = _TRANSPORT | {
    "ports": [(_LOAD_WORD, _PACKET_TYPE, "", ""), (_EQUAL, _OUTGOING, "to", "")],
    "from": [(_LOAD_HALF_AT_X, 0, "", ""), (_EQUAL, PORT, "take", "drop")],
    "to": [(_LOAD_HALF_AT_X, 2, "", "")],
} | _QUERY  # fmt: skip


def dns_filter(*, lo: bool) -> bytes:
    """Returns the filter for lo, where the socket must ignore what leaves, or for another interface."""
    return _assembled(_ON_LO if lo else _ELSEWHERE)


def _assembled(blocks: dict[str, list[Step]]) -> bytes:
    places = dict[str, int]()
    count = 0
    for label, steps in blocks.items():
        places[label] = count
        count += len(steps)
    made = b""
    for at, (code, operand, yes, no) in enumerate(step for steps in blocks.values() for step in steps):
        if isinstance(operand, str):
            made += _INSTRUCTION.pack(code, 0, 0, places[operand] - at - 1)
        else:
            made += _INSTRUCTION.pack(code, *(places[one] - at - 1 if one else 0 for one in (yes, no)), operand)
    return made
