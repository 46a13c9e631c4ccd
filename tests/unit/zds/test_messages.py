# SPDX-License-Identifier: Apache-2.0
"""ZDS on the wire: bytes as protoc's encoders make them, and what proto3 says about reading."""

from __future__ import annotations

import pytest

from agent.core.errors import ProtocolError
from agent.zds import messages
from agent.zds.messages import Ack, Add, Delete, Hello, Keep, SnapshotSent, encode

SAMPLES = [
    (Hello(), "08 01"),
    (Add("u1", "web", "shop", "sa"), "0a 15 0a 02 75 31 12 0f 0a 03 77 65 62 12 04 73 68 6f 70 1a 02 73 61"),
    (Add("u1", "", "", ""), "0a 06 0a 02 75 31 12 00"),
    (Delete("u1"), "12 04 12 02 75 31"),
    (SnapshotSent(), "1a 00"),
    (Keep("u1"), "2a 04 0a 02 75 31"),
    (Ack(), "0a 00"),
    (Ack("no"), "0a 04 0a 02 6e 6f"),
]


def decode(message: messages.Message, data: bytes) -> messages.Message:
    if isinstance(message, Hello):
        return messages.decode_hello(data)
    return messages.decode_response(data) if isinstance(message, Ack) else messages.decode_request(data)


@pytest.mark.parametrize(("message", "data"), SAMPLES)
def test_known_bytes(message: messages.Message, data: str) -> None:
    assert encode(message) == bytes.fromhex(data)
    assert decode(message, bytes.fromhex(data)) == message


def test_long_lengths_take_two_bytes() -> None:
    assert encode(Ack("x" * 200))[:6] == bytes.fromhex("0a cb 01 0a c8 01")
    assert messages.decode_response(encode(Ack("x" * 200))) == Ack("x" * 200)


def test_a_message_is_at_most_1024_bytes() -> None:
    assert len(encode(Ack("x" * 1018))) == messages.MAX_MESSAGE
    with pytest.raises(ProtocolError):
        encode(Ack("x" * 1019))
    with pytest.raises(ProtocolError):
        messages.decode_request(b"\x1a\0" * 600)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ("2a 04 0a 02 75 31 78 05 7d 01 02 03 04 79 01 02 03 04 05 06 07 08 7a 01 00", Keep("u1")),  # unknown
        ("2a 08 0a 02 75 31 0a 02 75 32", Keep("u2")),  # the last value wins
        ("2a 04 0a 02 75 31 1a 00", SnapshotSent()),  # the last member of a oneof wins
        ("1a 00 2a 04 0a 02 75 31", Keep("u1")),
        ("0a 04 0a 02 75 31 0a 05 12 03 0a 01 6e", Add("u1", "n", "", "")),  # one member twice: merged
        ("0a 0d 0a 02 75 31 12 03 0a 01 6e 12 02 12 00", Add("u1", "n", "", "")),  # embedded twice: merged
        ("12 08 0a 02 78 78 12 02 75 31", Delete("u1")),  # uid of a Delete is field 2
        ("aa 00 04 0a 02 75 31", Keep("u1")),  # a number may be written longer than needed
    ],
)
def test_reading_is_proto3(data: str, wanted: messages.Request) -> None:
    assert messages.decode_request(bytes.fromhex(data)) == wanted


def test_hello_defaults_to_no_version() -> None:
    assert messages.decode_hello(b"") == Hello(0)


@pytest.mark.parametrize(
    "data",
    [
        "",  # nothing asked
        "22 00",  # field 4: not known
        "0a 04 0a 02 75 31",  # Add without workload_info
        "2a",  # no length
        "2a 05 0a 02 75 31",  # cut off
        "2a 04 0a 03 75 31",  # cut off inside
        "2a 04 0a 02 ff fe",  # not UTF-8
        "28 01",  # a number where a message belongs
        "2a 02 08 01",  # a number where a string belongs
        "1a 01 08",  # nothing known inside, and torn
        "2b 2c",  # a group
        "02 00",  # field 0
        "2a 04 0a 02 75 31 ff ff ff ff ff ff ff ff ff ff 01",  # more than 64 bits
        "2a ff ff ff ff ff ff ff ff ff 7f",
    ],
)
def test_garbage_is_refused(data: str) -> None:
    with pytest.raises(ProtocolError):
        messages.decode_request(bytes.fromhex(data))
