# SPDX-License-Identifier: Apache-2.0
"""Every bound against a hostile or broken peer. Pure.

A peer beyond one of them loses its session, nothing else. Sizes are in bytes.
"""

from __future__ import annotations

from typing import Final

# What the peer may have in flight, so what it can make this process hold. The first two are those of Istio's ztunnel.
STREAM_WINDOW: Final = 4 << 20
CONNECTION_WINDOW: Final = 16 << 20
MAX_FRAME: Final = 1 << 20  # of DATA, which is handed on as it arrives

# Other frames are held until they are whole.
MAX_HEADER_BLOCK: Final = 16 << 10  # a HEADERS frame and its CONTINUATION frames
MAX_HEADER_FRAMES: Final = 16  # of one block
MAX_CONTROL_FRAME: Final = 16 << 10
MAX_HEADERS: Final = 16 << 10  # decoded, as SETTINGS_MAX_HEADER_LIST_SIZE counts; a CONNECT has less than 2 KiB

STREAMS_PER_SESSION: Final = 200  # that a client may have open at once
POOLED_STREAMS: Final = 100  # that this process opens on one session

# Frames that carry no data (HEADERS, PING, SETTINGS, WINDOW_UPDATE, RST_STREAM, empty DATA, unknown ones): a peer may
# send so many at once, so many a second, one more for each KiB that it was sent, and some for each stream. A thousand
# take 50 ms of CPU.
IDLE_FRAMES: Final = 1_000
IDLE_FRAMES_PER_SECOND: Final = 100
BYTES_PER_IDLE_FRAME: Final = 1 << 10
IDLE_FRAMES_PER_STREAM: Final = 5  # its headers, its window, its end, its reset
FIELDS_PER_IDLE_FRAME: Final = 8  # of a request: many small fields cost as much
# Streams that are refused, or that the peer resets before they are answered (CVE-2023-44487).
EARLY_ENDS: Final = 1_000
EARLY_ENDS_PER_SECOND: Final = 500

# Of a session's output. Above the first streams stop reading their application; only answers to control frames can
# reach the second.
FULL_OUTPUT: Final = 256 << 10
MAX_OUTPUT: Final = 2 << 20

# Input is read in large parts as long as the last one took less than TURN_SECONDS, else in small ones; then other
# sessions get their turn.
SMALL_READ: Final = 16 << 10
TURN_SECONDS: Final = 0.01

HANDSHAKE_SECONDS: Final = 10.0  # from accept to the end of the TLS handshake
PING_SECONDS: Final = 10.0
PING_TIMEOUT_SECONDS: Final = 20.0  # of a peer that is silent
STALL_SECONDS: Final = 60.0  # of a peer that sends, but reads no PING
IDLE_SESSION_SECONDS: Final = 300.0  # without a stream
NOTIFY_SECONDS: Final = 1.0  # for a peer to answer that it knows of a drain

# Of clients, which are addresses. An unfinished handshake holds 1 KB before the client's first byte and 45 KB after it,
# an open session 40 KB and an idle stream 3 KB. The streams of a pod are among its connections (see settings.share).
HANDSHAKES: Final = 2048  # unfinished, of all pods
HANDSHAKES_PER_POD: Final = 512
HANDSHAKES_PER_CLIENT: Final = 64
HANDSHAKE_PATIENCE_SECONDS: Final = 1.0  # then a handshake makes room for another one where these limits are reached
SESSIONS_PER_POD: Final = 4096
SESSIONS_PER_CLIENT: Final = 128


class Budget:
    """A token bucket: `most` at once, and `per_second`."""

    __slots__ = ("_left", "_most", "_per_second", "_since")

    def __init__(self, most: int, per_second: int, now: float) -> None:
        self._left = float(most)
        self._most = most
        self._per_second = per_second
        self._since = now

    def spend(self, now: float, count: int = 1) -> bool:
        """Takes `count`; returns False if so many are not left."""
        self._left = min(self._most, self._left + (now - self._since) * self._per_second) - count
        self._since = now
        return self._left >= 0

    def add(self, count: float) -> None:
        self._left = min(self._most, self._left + count)
