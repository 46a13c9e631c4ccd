# SPDX-License-Identifier: Apache-2.0
"""Whatever arrives, a ZDS decoder gives a message or ProtocolError; what was encoded decodes to itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.zds import messages
from agent.zds.messages import Ack, Add, Delete, Keep, SnapshotSent, encode

DECODERS = [messages.decode_hello, messages.decode_request, messages.decode_response]
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
requests = st.one_of(
    st.builds(Add, text, text, text, text), st.builds(Keep, text), st.builds(Delete, text), st.just(SnapshotSent())
)


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=1100))
def test_any_bytes(decode: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(requests, st.data())
def test_damaged_requests(request: messages.Request, data: st.DataObject) -> None:
    sent = bytearray(encode(request))
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        messages.decode_request(bytes(sent[: data.draw(st.integers(0, len(sent)))]))


@given(requests)
def test_requests_survive(request: messages.Request) -> None:
    assert messages.decode_request(encode(request)) == request


@given(requests, requests)
def test_the_last_member_wins(first: messages.Request, last: messages.Request) -> None:
    if type(first) is not type(last):
        assert messages.decode_request(encode(first) + encode(last)) == last


@given(text)
def test_acknowledgements_survive(error: str) -> None:
    assert messages.decode_response(encode(Ack(error))) == Ack(error)
