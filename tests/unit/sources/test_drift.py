# SPDX-License-Identifier: Apache-2.0
"""Which notifications concern a captured pod."""

from __future__ import annotations

import struct

import pytest

from agent.core.wire.netlink import Message, attribute
from agent.core.wire.rtnetlink import Rtm
from agent.sources.drift import concerns


def route(table: int, *, wide: int = 0) -> bytes:
    more = attribute(15, struct.pack("=I", wide)) if wide else b""
    return struct.pack("=BBBBBBBBI", 2, 0, 0, 0, table, 0, 0, 0, 0) + more


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (Rtm.NEWRULE, bytes(12), True),
        (Rtm.DELRULE, bytes(12), True),
        (Rtm.NEWADDR, bytes(8), True),
        (Rtm.DELADDR, bytes(8), True),
        (Rtm.NEWROUTE, route(100), True),
        (Rtm.DELROUTE, route(252, wide=100), True),
        (Rtm.DELROUTE, route(254), False),
        (Rtm.DELROUTE, route(253), False),
        (Rtm.NEWROUTE, route(100, wide=1124), False),
        (Rtm.NEWLINK, struct.pack("=BxHiII", 0, 0, 1, 0, 0), True),
        (Rtm.NEWLINK, struct.pack("=BxHiII", 0, 0, 2, 0, 0), False),
        (28, bytes(12), False),
    ],
)
def test_concerns(kind: int, body: bytes, expected: bool) -> None:
    assert concerns(Message(kind, 0, 0, 0, body)) is expected


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (Rtm.DELROUTE, route(254), True),
        (Rtm.NEWROUTE, route(253), False),
        (Rtm.NEWLINK, struct.pack("=BxHiII", 0, 0, 2, 0, 0), True),
    ],
)
def test_concerns_where_interfaces_and_routes_are_followed(kind: int, body: bytes, expected: bool) -> None:
    assert concerns(Message(kind, 0, 0, 0, body), wiring=True) is expected
