# SPDX-License-Identifier: Apache-2.0
"""Events of an HTTP/2 session, as session_core reports them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from agent.ztunnel.hbone.frames import Data

Headers = list[tuple[bytes, bytes]]


class Opened(NamedTuple):
    """The client opened a stream."""

    stream: int
    headers: Headers


class Answered(NamedTuple):
    """The server answered a request."""

    stream: int
    headers: Headers


class Ended(NamedTuple):
    """The peer sends no more bytes on this stream."""

    stream: int


class Reset(NamedTuple):
    """The peer has reset the stream."""

    stream: int
    code: int


class GoneAway(NamedTuple):
    """The peer takes no more streams, and none above `last` was processed."""

    last: int
    code: int


Happening = Data | Opened | Answered | Ended | Reset | GoneAway


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Returns the value of the first header with this name."""
    return next((value for key, value in headers if key == name), None)
