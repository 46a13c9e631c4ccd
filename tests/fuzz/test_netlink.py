# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes arrive, netlink parsing ends without an error and yields nothing that was not there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.wire import netlink

payloads = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=20)), max_size=5)


@given(st.binary(max_size=300))
def test_any_attributes(data: bytes) -> None:
    """Never raises, never loops, never yields more than it was given."""
    found = list(netlink.attributes(data))
    assert sum(4 + len(payload) for _, payload in found) <= len(data)
    assert all(kind <= 0x3FFF and payload in data for kind, payload in found)


@given(st.binary(max_size=300))
def test_any_messages(data: bytes) -> None:
    """Never raises, never loops, never yields more than it was given."""
    found = list(netlink.messages(data))
    assert sum(netlink.HEADER.size + len(message.body) for message in found) <= len(data)
    assert all(message.body in data for message in found)


@given(payloads, st.integers(0, 60))
def test_attributes_survive_and_a_torn_tail_loses_only_itself(parts: list[tuple[int, bytes]], cut: int) -> None:
    """What was written is read back; what was cut off is left out, and nothing before it."""
    data = b"".join(netlink.attribute(kind, payload) for kind, payload in parts)
    assert list(netlink.attributes(data)) == parts
    torn = list(netlink.attributes(data[: max(0, len(data) - cut)]))
    assert torn == parts[: len(torn)]


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=20)), max_size=4))
def test_messages_survive(parts: list[tuple[int, int, bytes]]) -> None:
    """What was written is read back, each message padded to four bytes."""
    sent = [netlink.message(kind, flags, 7, body) for kind, flags, body in parts]
    data = b"".join(one + bytes(-len(one) % 4) for one in sent)
    assert [(got.kind, got.flags, got.body) for got in netlink.messages(data)] == parts
