# SPDX-License-Identifier: Apache-2.0
"""A peer of HBONE made of a raw socket, TLS and frames that it is told to send."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from collections.abc import Iterator

from hpack import Encoder
from support.ztunnel import PEER4, SECONDS, Place

from agent.ztunnel.tls.contexts import Credentials, make_contexts

PORT = 15008
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_MARK = 0x539  # the pod's rules leave it alone


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">HBBBL", size >> 8, size & 255, kind, flags, stream) + payload


def request(port: int = 8080, host: str = PEER4, *more: tuple[bytes, bytes]) -> bytes:
    """The header block of a CONNECT."""
    fields = [(b":method", b"CONNECT"), (b":authority", f"{host}:{port}".encode()), *more]
    block: bytes = Encoder().encode(fields)
    return block


def opening(stream: int, block: bytes = b"") -> bytes:
    """A HEADERS frame that opens a stream."""
    return frame(HEADERS, END_HEADERS, stream, block or request())


def connect(place: Place, host: str = PEER4, source: str = "") -> socket.socket:
    """A TCP connection to the port of HBONE, past the rules of its own pod."""
    made = place.make(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARK)
    if source:
        made.bind((source, 0))
    made.connect((host, PORT))
    return made


class Peer:
    """A session after its TLS handshake."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self.tls = tls
        self._read = b""

    def send(self, *frames: bytes) -> bool:
        """Returns False if the other end has ended the session."""
        try:
            self.tls.sendall(b"".join(frames))
        except OSError:
            return False
        return True

    def greet(self, settings: bytes = b"") -> None:
        self.send(PREFACE, frame(SETTINGS, 0, 0, settings))

    def next(self) -> tuple[int, int, int, bytes] | None:
        """The next frame as (kind, flags, stream, payload); None at the end of the session."""
        head = self._take(9)
        if head is None:
            return None
        high, low, kind, flags, stream = struct.unpack(">HBBBL", head)
        payload = self._take(high << 8 | low)
        return None if payload is None else (kind, flags, stream, payload)

    def _take(self, size: int) -> bytes | None:
        while len(self._read) < size:
            try:
                part = self.tls.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not part:
                return None
            self._read += part
        taken, self._read = self._read[:size], self._read[size:]
        return taken

    def until(self, kind: int, flags: int | None = None) -> tuple[int, int, int, bytes]:
        """The next frame of this kind; answers PINGs and SETTINGS."""
        while (found := self.next()) is not None:
            if found[0] == kind and (flags is None or found[1] == flags):
                return found
            if found[0] in (PING, SETTINGS) and not found[1] & ACK:
                self.send(frame(found[0], ACK, 0, found[3] if found[0] == PING else b""))
        raise AssertionError(f"the session ended before a frame of kind {kind}")

    def end(self) -> int | None:
        """Reads to the end of the session; returns the code of its GOAWAY, None without one."""
        code = None
        while (found := self.next()) is not None:
            if found[0] == GOAWAY:
                code = int.from_bytes(found[3][4:8], "big")
        return code


def tls_context(credentials: Credentials | None, alpn: str = "h2") -> ssl.SSLContext:
    """A client that believes every server; without credentials it has no certificate."""
    made = make_contexts(credentials).client if credentials else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.set_alpn_protocols([alpn])
    return made


@contextlib.contextmanager
def session(place: Place, context: ssl.SSLContext, host: str = PEER4, source: str = "") -> Iterator[Peer]:
    """A session whose handshake is done at this end; its settings have not been sent."""
    with connect(place, host, source) as raw:
        raw.settimeout(SECONDS)
        with context.wrap_socket(raw, suppress_ragged_eofs=False) as tls:
            yield Peer(tls)


def is_ended(connection: socket.socket) -> bool:
    """True if the other end has closed; does not wait."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        return connection.recv(1 << 16, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
