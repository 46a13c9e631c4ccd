# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 by nghttp2 (libnghttp2, through ctypes): a stack other than the product's h2. One session, one thread.

nghttp2 checks what it receives: a frame that breaks the protocol ends the session, and `Http2Peer.pump` raises.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_ssize_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass, field
from enum import IntEnum

from support.gnutls import GnuTls
from support.ztunnel import SECONDS

_NO_AUTO_WINDOW, _DEFERRED, _EOF, _ACK = 1, -508, 1, 1


class Frame(IntEnum):
    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Setting(IntEnum):
    HEADER_TABLE_SIZE = 1
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


class _Head(ctypes.Structure):
    """nghttp2_frame_hd and the beginning of the frames that the tests look into."""

    _fields_ = (
        ("length", c_size_t), ("stream", c_int32), ("type", c_uint8), ("flags", c_uint8), ("reserved", c_uint8),
        ("first", c_uint32), ("second", c_uint32),
    )  # fmt: skip


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p), ("value", c_char_p), ("name_length", c_size_t), ("value_length", c_size_t),
        ("flags", c_uint8),
    )  # fmt: skip


class _Setting(ctypes.Structure):
    _fields_ = (("identifier", c_int32), ("value", c_uint32))


_OnFrame = CFUNCTYPE(c_int, c_void_p, POINTER(_Head), c_void_p)
_OnChunk = CFUNCTYPE(c_int, c_void_p, c_uint8, c_int32, POINTER(c_uint8), c_size_t, c_void_p)
_OnHeader = CFUNCTYPE(
    c_int, c_void_p, POINTER(_Head), POINTER(c_uint8), c_size_t, POINTER(c_uint8), c_size_t, c_uint8, c_void_p
)
_OnClose = CFUNCTYPE(c_int, c_void_p, c_int32, c_uint32, c_void_p)
_Padding = CFUNCTYPE(c_ssize_t, c_void_p, POINTER(_Head), c_size_t, c_void_p)
_Read = CFUNCTYPE(c_ssize_t, c_void_p, c_int32, POINTER(c_uint8), c_size_t, POINTER(c_uint32), c_void_p, c_void_p)


class _Source(ctypes.Structure):
    """nghttp2_data_provider."""

    _fields_ = (("source", c_void_p), ("read", _Read))


_library = ctypes.CDLL("libnghttp2.so.14")
_library.nghttp2_strerror.restype = c_char_p
_library.nghttp2_session_mem_send.restype = c_ssize_t
_library.nghttp2_session_mem_recv.restype = c_ssize_t
_library.nghttp2_session_mem_recv.argtypes = [c_void_p, c_char_p, c_size_t]
_library.nghttp2_session_consume.argtypes = [c_void_p, c_int32, c_size_t]


class Http2Error(Exception):
    pass


def _call(name: str, *arguments: object) -> int:
    code: int = getattr(_library, name)(*arguments)
    if code < 0:
        raise Http2Error(f"{name}: {_library.nghttp2_strerror(int(code)).decode()}")
    return code


@dataclass
class Stream:
    number: int
    blocks: list[list[tuple[str, str]]] = field(default_factory=list)  # of header fields; each 1xx is one
    data: bytearray = field(default_factory=bytearray)
    ended: bool = False
    closed: int | None = None  # the error code
    sending: bytearray = field(default_factory=bytearray)
    ending: bool = False

    @property
    def status(self) -> str:
        return dict(self.blocks[-1])[":status"] if self.blocks else ""

    @property
    def authority(self) -> str:
        return dict(self.blocks[0])[":authority"]


@dataclass
class Http2Peer:
    """One end of a session. `chunk` bounds the payload of its DATA frames, `padding` is added to them and HEADERS.

    `manual`: windows are opened by `consume` alone. `rewrite` replaces each frame on its way out.
    """

    tls: GnuTls
    server: bool = False
    manual: bool = False
    settings: Mapping[int, int] = field(default_factory=dict)
    chunk: int = 1 << 20
    padding: int = 0
    rewrite: Callable[[bytes], bytes] = bytes
    streams: dict[int, Stream] = field(default_factory=dict)
    frames: list[tuple[int, int, int, int]] = field(default_factory=list)  # received: type, flags, stream, length
    pongs: int = 0
    acknowledged: int = 0  # of its SETTINGS
    goaway: tuple[int, int] | None = None  # the other's: (last stream, error code)
    over: bool = False

    def __post_init__(self) -> None:
        self._session = c_void_p()
        self._fields: list[tuple[str, str]] = []  # of the block that is being received
        self._read = _Read(self._give)
        callbacks, options = c_void_p(), c_void_p()
        _call("nghttp2_session_callbacks_new", byref(callbacks))
        self._callbacks = {
            "on_frame_recv": _OnFrame(self._took_frame), "on_data_chunk_recv": _OnChunk(self._took_data),
            "on_header": _OnHeader(self._took_field), "on_stream_close": _OnClose(self._stream_closed),
            "select_padding": _Padding(lambda _s, head, most, _u: min(most, head.contents.length + self.padding)),
        }  # fmt: skip
        for name, callback in self._callbacks.items():
            getattr(_library, f"nghttp2_session_callbacks_set_{name}_callback")(callbacks, callback)
        _call("nghttp2_option_new", byref(options))
        _library.nghttp2_option_set_no_auto_window_update(options, int(self.manual))
        kind = "server" if self.server else "client"
        _call(f"nghttp2_session_{kind}_new2", byref(self._session), callbacks, None, options)
        _library.nghttp2_option_del(options)
        _library.nghttp2_session_callbacks_del(callbacks)
        self.set(self.settings)

    # What is received

    def _took_frame(self, _session: object, head: ctypes._Pointer[_Head], _user: object) -> int:
        frame = head.contents
        self.frames.append((frame.type, frame.flags, frame.stream, frame.length))
        if frame.type == Frame.PING and frame.flags & _ACK:
            self.pongs += 1
        elif frame.type == Frame.SETTINGS and frame.flags & _ACK:
            self.acknowledged += 1
        elif frame.type == Frame.GOAWAY:
            self.goaway = (frame.first, frame.second)
        elif frame.type in (Frame.DATA, Frame.HEADERS):
            stream = self._stream(frame.stream)
            if frame.type == Frame.HEADERS:
                stream.blocks.append(self._fields)
                self._fields = []
            stream.ended |= bool(frame.flags & 1)
        return 0

    def _took_data(self, _s: object, _flags: int, number: int, data: object, size: int, _user: object) -> int:
        self._stream(number).data += ctypes.string_at(data, size)
        return 0

    def _took_field(self, _session: object, _head: object, *rest: object) -> int:
        name, name_size, value, value_size, _flags, _user = rest
        read = ctypes.string_at
        self._fields.append((read(name, name_size).decode(), read(value, value_size).decode()))
        return 0

    def _stream_closed(self, _session: object, number: int, code: int, _user: object) -> int:
        self._stream(number).closed = code
        return 0

    def _stream(self, number: int) -> Stream:
        return self.streams.setdefault(number, Stream(number))

    def _give(self, _s: object, number: int, buffer: object, most: int, flags: object, _p: object, _u: object) -> int:
        stream = self.streams[number]
        part = bytes(stream.sending[: min(most, self.chunk)])
        del stream.sending[: len(part)]
        ctypes.memmove(buffer, part, len(part))
        if stream.ending and not stream.sending:
            flags[0] |= _EOF  # type: ignore[index]
        elif not part:
            return _DEFERRED
        return len(part)

    # What is sent: submitted here, and written by `pump`

    def connect(self, authority: str, *fields: tuple[str, str]) -> Stream:
        source = byref(_Source(None, self._read))
        array, count = _fields([(":method", "CONNECT"), (":authority", authority), *fields])
        number = _call("nghttp2_submit_request", self._session, None, array, count, source, None)
        return self._stream(number)

    def respond(self, stream: Stream, status: str = "200", *fields: tuple[str, str]) -> None:
        source = byref(_Source(None, self._read))
        _call("nghttp2_submit_response", self._session, stream.number, *_fields([(":status", status), *fields]), source)

    def inform(self, stream: Stream, status: str) -> None:
        """Sends a 1xx response."""
        _call(
            "nghttp2_submit_headers", self._session, 0, stream.number, None, *_fields([(":status", status)]), None
        )  # fmt: skip

    def send(self, stream: Stream, data: bytes, *, end: bool = False) -> None:
        stream.sending += data
        stream.ending |= end
        _library.nghttp2_session_resume_data(self._session, stream.number)

    def reset(self, stream: Stream, code: int = 8) -> None:
        _call("nghttp2_submit_rst_stream", self._session, 0, stream.number, c_uint32(code))

    def set(self, settings: Mapping[int, int]) -> None:
        values = (_Setting * len(settings))(*(_Setting(key, value) for key, value in settings.items()))
        _call("nghttp2_submit_settings", self._session, 0, values, c_size_t(len(settings)))

    def ping(self) -> None:
        _call("nghttp2_submit_ping", self._session, 0, c_char_p(b"12345678"))

    def leave(self, last: int) -> None:
        """Sends GOAWAY: streams after `last` were not processed."""
        _call("nghttp2_submit_goaway", self._session, 0, last, c_uint32(0), None, c_size_t(0))

    def consume(self, stream: Stream, size: int) -> None:
        """Opens the windows of stream and session by `size`."""
        for number in (stream.number, 0):
            _call("nghttp2_submit_window_update", self._session, 0, number, size)

    def window(self, size: int) -> None:
        """Sets the session's receive window."""
        _call("nghttp2_session_set_local_window_size", self._session, 0, 0, size)

    def raw(self, kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> None:
        """Writes a frame that nghttp2 would not."""
        self._flush()
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self.tls.send(head + payload)

    def pump(self, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        """Writes and reads until the condition is true. Raises Http2Error, AssertionError after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            self._flush()
            if condition():
                return
            assert not self.over, "the other side has ended the session"
            data = self.tls.receive(max(0.0, until - time.monotonic()))
            assert data is not None, f"not in {seconds:g} s"
            self.over = not data
            _call("nghttp2_session_mem_recv", self._session, data, len(data))

    def idle(self, seconds: float) -> None:
        """Writes and reads for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.over:
            self._flush()
            if data := self.tls.receive(left):
                _call("nghttp2_session_mem_recv", self._session, data, len(data))

    def _flush(self) -> None:
        data = c_void_p()
        while size := _call("nghttp2_session_mem_send", self._session, byref(data)):
            self.tls.send(self.rewrite(ctypes.string_at(data, size)))

    def close(self) -> None:
        _library.nghttp2_session_del(self._session)
        self.tls.close()


def _fields(pairs: Sequence[tuple[str, str]]) -> tuple[object, c_size_t]:
    made = [(name.encode(), value.encode()) for name, value in pairs]
    array = (_Field * len(made))(*(_Field(name, value, len(name), len(value), 0) for name, value in made))
    return array, c_size_t(len(made))
