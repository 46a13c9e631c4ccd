# SPDX-License-Identifier: Apache-2.0
"""Buffers that all sessions of one event loop share: none of them is held from one call to the next. Pure."""

from __future__ import annotations

from typing import Final

from agent.ztunnel.hbone.frames import HEADER_SIZE
from agent.ztunnel.hbone.tls_codec import RECORD

SIZE: Final = 256 << 10


class WorkBuffers:
    """`records` is for bytes from the network, `plain` for what they hold, `frame` for a DATA frame to be sent."""

    __slots__ = ("frame", "frame_payload", "frame_view", "plain", "records")

    def __init__(self) -> None:
        self.records = memoryview(bytearray(SIZE))
        self.plain = memoryview(bytearray(SIZE + RECORD))  # so that all of `records` fits at once
        self.frame = bytearray(HEADER_SIZE + SIZE)
        self.frame_view = memoryview(self.frame)
        self.frame_payload = self.frame_view[HEADER_SIZE:]
