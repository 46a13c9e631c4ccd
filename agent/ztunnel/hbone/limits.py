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
MAX_HEADER_BLOCK: Final = 64 << 10  # a HEADERS frame and its CONTINUATION frames
MAX_HEADER_FRAMES: Final = 16  # of one block
MAX_CONTROL_FRAME: Final = 16 << 10
MAX_REQUEST_HEADERS: Final = 64 << 10  # decoded, as SETTINGS_MAX_HEADER_LIST_SIZE counts
MAX_RESPONSE_HEADERS: Final = 16 << 10

STREAMS_PER_SESSION: Final = 200  # that a client may have open at once
POOLED_STREAMS: Final = 100  # that this process opens on one session

# Frames that carry nothing (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM, empty DATA, unknown ones): a peer may
# send so many at once, so many a second, and one more for each KiB that it was sent.
IDLE_FRAMES: Final = 10_000
IDLE_FRAMES_PER_SECOND: Final = 500
BYTES_PER_IDLE_FRAME: Final = 1 << 10
# Streams that the peer resets before they are answered (CVE-2023-44487).
EARLY_RESETS: Final = 500
EARLY_RESETS_PER_SECOND: Final = 50

# Of a session's output. Above the first streams stop reading their application; only answers to control frames can
# reach the second.
FULL_OUTPUT: Final = 256 << 10
MAX_OUTPUT: Final = 2 << 20

HANDSHAKE_SECONDS: Final = 10.0  # from accept to the end of the TLS handshake and the client's SETTINGS
PING_SECONDS: Final = 10.0
PING_TIMEOUT_SECONDS: Final = 20.0
IDLE_SESSION_SECONDS: Final = 300.0  # without a stream
