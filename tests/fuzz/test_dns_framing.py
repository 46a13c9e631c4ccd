# SPDX-License-Identifier: Apache-2.0
"""DNS over TCP: however the bytes arrive, the same messages come out, and no byte is lost or held too long."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.ztunnel.dns.dns_framing import LENGTH, DnsFraming, Piece, framed

LONGEST = 40
HEAD = b"\0\1\1\0\0\1" + bytes(6)  # of a query
MESSAGES = st.lists(
    st.one_of(st.binary(max_size=37), st.integers(50, 65535 - len(HEAD)).map(lambda size: HEAD + bytes(size))),
    max_size=6,
)
CUTS = st.lists(st.integers(0, 70000), max_size=30)


def pieces_of(stream: bytes, cuts: list[int], *, queries: bool = True) -> list[Piece]:
    framing = DnsFraming(LONGEST, queries=queries)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [
        piece
        for start, end in itertools.pairwise(bounds)
        if start < end
        for piece in framing.cut(stream[start:end])
    ]  # fmt: skip


@given(MESSAGES, CUTS)
def test_any_cut_gives_the_same_messages(messages: list[bytes], cuts: list[int]) -> None:
    whole: list[bytes] = []
    for piece in pieces_of(b"".join(map(framed, messages)), cuts):
        assert piece.first == (not whole or len(whole[-1]) == LENGTH + int.from_bytes(whole[-1][:LENGTH]))
        if piece.first:
            whole.append(piece.data)
        else:
            whole[-1] += piece.data
        assert piece.last == (len(whole[-1]) == LENGTH + int.from_bytes(whole[-1][:LENGTH]))
    assert [message[LENGTH:] for message in whole] == messages


@given(st.binary(min_size=1, max_size=300), CUTS, st.booleans())
def test_any_bytes_are_held_for_a_short_message_alone(stream: bytes, cuts: list[int], queries: bool) -> None:
    passed = b"".join(piece.data for piece in pieces_of(stream, cuts, queries=queries))
    assert stream.startswith(passed)
    assert len(stream) - len(passed) < LENGTH + LONGEST


@given(st.binary(max_size=3000), CUTS)
def test_another_protocol_is_never_held(rest: bytes, cuts: list[int]) -> None:
    stream = b"SSH-2.0-OpenSSH_9.2p1\r\n" + rest
    pieces = pieces_of(stream, [cut for cut in cuts if cut >= 8])
    assert b"".join(piece.data for piece in pieces) == stream
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert not any(piece.last for piece in pieces)
