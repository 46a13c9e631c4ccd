# SPDX-License-Identifier: Apache-2.0
"""Frames that cost the receiver more than their sender: each kind is allowed at a rate."""

from __future__ import annotations

import pytest
from hyperframe import frame as rfc
from support.session_pair import CONNECT, Pair, data, headers, receive, window_update

from agent.ztunnel.hbone import limits
from agent.ztunnel.hbone.frames import ErrorCode, Http2Error


def test_a_flood_of_headers_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Informational answers; headers on a stream that was reset."""
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=True)
    stream = pair.core.open(CONNECT)
    with pytest.raises(Http2Error, match="carry no data"):
        for _ in range(60):
            receive(pair.core, headers(stream, [(b":status", b"103")]))
    pair = Pair(client=False)
    stream = pair.open()
    pair.core.reset(stream, ErrorCode.CANCEL)
    with pytest.raises(Http2Error, match="carry no data"):
        for _ in range(60):
            receive(pair.core, headers(stream, CONNECT))


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize(
    "raw",
    [
        rfc.PingFrame(0, b"12345678").serialize(),
        rfc.SettingsFrame(0).serialize(),
        rfc.PriorityFrame(1, depends_on=3).serialize(),
        window_update(0, 1),
        data(1, b""),
        b"\0\0\1\xbb\0\0\0\0\0x",  # an unknown type
    ],
    ids=["ping", "settings", "priority", "window", "empty", "unknown"],
)
def test_a_flood_of_frames_that_carry_nothing_ends_the_session(
    monkeypatch: pytest.MonkeyPatch, client: bool, raw: bytes
) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    pair = Pair(client=client)
    pair.open()
    with pytest.raises(Http2Error, match="ENHANCE_YOUR_CALM"):
        for _ in range(limits.IDLE_FRAMES + 1):
            receive(pair.core, raw)
            pair.core.output.clear()


def test_frames_that_carry_nothing_are_allowed_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    monkeypatch.setattr(limits, "IDLE_FRAMES_PER_SECOND", 50)
    pair = Pair(client=False)
    for second in range(20):
        for _ in range(50):
            receive(pair.core, window_update(0, 1), float(second))


def test_window_updates_for_bytes_that_were_sent_are_never_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    pair = Pair(client=True)
    stream = pair.open()
    for _ in range(400):
        pair.core.sent(stream, 4096)
        receive(pair.core, window_update(0, 4096) + window_update(stream, 4096))


@pytest.mark.parametrize("refused", [False, True])
def test_a_flood_of_streams_that_end_before_they_begin_ends_the_session(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    monkeypatch.setattr(limits, "EARLY_ENDS", 50)
    pair = Pair(client=False)
    with pytest.raises(Http2Error, match="end before they begin"):
        for number in range(1, 2 * limits.EARLY_ENDS + 10, 2):
            pair.peer.send_headers(number, CONNECT)
            if not refused:
                pair.peer.reset_stream(number, 8)
            pair.swap()
            if refused:
                pair.core.answer(number, [(b":status", b"503")], end=True)
    assert number / 2 + 1 > limits.EARLY_ENDS


def test_many_short_streams_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one sends headers, a window, an end and perhaps a reset, which carry no data."""
    monkeypatch.setattr(limits, "EARLY_ENDS", 50)
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=False)
    for _ in range(200):
        stream = pair.open()
        receive(pair.core, window_update(stream, 1))
        pair.peer.end_stream(stream)
        pair.swap()
        pair.core.end(stream)
        pair.swap()


def test_requests_with_many_fields_cost_as_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=False)
    with pytest.raises(Http2Error, match="carry no data"):
        for number in (1, 3, 5):
            pair.peer.send_headers(number, [*CONNECT, *[(b"x", b"")] * 200])
            pair.swap()
