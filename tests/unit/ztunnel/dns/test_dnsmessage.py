# SPDX-License-Identifier: Apache-2.0
"""What is a query, what is an answer, and the answer that says that a resolver failed."""

from __future__ import annotations

import pytest

from agent.ztunnel.dns.dnsmessage import failure, is_answer, question

ASKED = b"\x12\x34\1\x10\0\1\0\0\0\0\0\0\3www\4test\0\0\x1c\0\1"
OPTIONS = b"\0\0\x29\4\xd0\0\0\0\0\0\0"  # EDNS


def test_a_question_ends_before_what_is_additional() -> None:
    asked = question(ASKED[:11] + b"\1" + ASKED[12:] + OPTIONS)
    assert asked[12:] == ASKED[12:] and not is_answer(asked)
    answer = failure(asked)
    assert answer == b"\x12\x34\x81\x82\0\1\0\0\0\0\0\0" + ASKED[12:]
    assert is_answer(answer) and question(answer) == b""


@pytest.mark.parametrize(
    "message",
    [
        b"", ASKED[:11], ASKED[:12], ASKED[:-1], ASKED[:5] + b"\2" + ASKED[6:], ASKED[:12] + b"\xc0\x0c\0\1\0\1",
        ASKED[:12] + b"\x3f" + bytes([63]) * 300, b"\1\0\0\0" + b"k" * 144, ASKED[:12] + b"\1a" * 200 + b"\0\0\1\0\1",
    ],
)  # fmt: skip
def test_what_is_no_question(message: bytes) -> None:
    assert question(message) == b""
