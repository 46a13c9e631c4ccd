# SPDX-License-Identifier: Apache-2.0
"""The filter as an interpreter of classic BPF sees it."""

from __future__ import annotations

import struct

from agent.core.wire.netlink import message, type_filter
from agent.core.wire.nftables import NEWGEN, NEWRULE


def passes(program: bytes, packet: bytes) -> bool:
    """Runs the three instructions that are used; others raise."""
    steps, at, register = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x28:
            register = int.from_bytes(packet[operand : operand + 2])
        elif code == 0x15:
            at += yes if register == operand else no
        elif code == 0x06:
            return operand > 0
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


def test_only_messages_of_the_type_pass() -> None:
    for kind in (NEWGEN, 3, 0x1234):
        assert passes(type_filter(kind), message(kind, 0, 1, b"body"))
        assert not passes(type_filter(kind), message(NEWRULE, 0, 1, b"body"))
        assert not passes(type_filter(kind), message(kind ^ 0x0100, 0, 1, b"body"))
