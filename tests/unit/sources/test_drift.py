"""Which notifications concern a captured pod."""

from __future__ import annotations

import struct

import pytest

from agent.core.wire.netlink import Message, attribute
from agent.kernel.netlink.routes import DELADDR, DELROUTE, DELRULE, NEWADDR, NEWLINK, NEWROUTE, NEWRULE
from agent.sources.drift import concerns


def route(table: int, *, wide: int = 0) -> bytes:
    more = attribute(15, struct.pack("=I", wide)) if wide else b""
    return struct.pack("=BBBBBBBBI", 2, 0, 0, 0, table, 0, 0, 0, 0) + more


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (NEWRULE, bytes(12), True),
        (DELRULE, bytes(12), True),
        (NEWADDR, bytes(8), True),
        (DELADDR, bytes(8), True),
        (NEWROUTE, route(100), True),
        (DELROUTE, route(252, wide=100), True),
        (DELROUTE, route(254), False),
        (DELROUTE, route(253), False),
        (NEWROUTE, route(100, wide=1124), False),
        (NEWLINK, struct.pack("=BxHiII", 0, 0, 1, 0, 0), True),
        (NEWLINK, struct.pack("=BxHiII", 0, 0, 2, 0, 0), False),
        (28, bytes(12), False),
    ],
)
def test_concerns(kind: int, body: bytes, expected: bool) -> None:
    assert concerns(Message(kind, 0, 0, 0, body)) is expected


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (DELROUTE, route(254), True),
        (NEWROUTE, route(253), False),
        (NEWLINK, struct.pack("=BxHiII", 0, 0, 2, 0, 0), True),
    ],
)
def test_concerns_where_interfaces_and_routes_are_followed(kind: int, body: bytes, expected: bool) -> None:
    assert concerns(Message(kind, 0, 0, 0, body), wiring=True) is expected
