# SPDX-License-Identifier: Apache-2.0
"""One HTTP/2 session: bytes in, events and bytes out. Pure; the caller passes the time.

The h2 library has SETTINGS, PING and PRIORITY. What concerns a stream never enters it (see frames and header_blocks),
so the states and windows of streams are kept here: through its objects DATA ran at a third of the speed, and they were
a quarter of the CPU of a new connection. GOAWAY does not enter it either: it takes one as the end of all streams, but
those that are open go on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import PingAckReceived, RemoteSettingsChanged
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from agent.ztunnel.hbone import frames, header_blocks, limits
from agent.ztunnel.hbone.frames import Data, ErrorCode, Frame, FrameSplitter, Http2Error
from agent.ztunnel.hbone.header_blocks import BlockReader, HeaderBlock
from agent.ztunnel.hbone.limits import Budget
from agent.ztunnel.hbone.session_events import Answered, Ended, GoneAway, Happening, Headers, Opened, Reset, first

_LARGEST_STREAM: Final = (1 << 31) - 1
_LAST_NEW_STREAM: Final = (1 << 30) + 1  # then another session is made: stream numbers are not reused
_PING: Final = b"sluice\0\0"
_CREDIT: Final = 4  # WINDOW_UPDATE is sent when a quarter of a window has been taken


class _Stream:
    """The state and the windows of one stream. `held`: received bytes that the application has not taken."""

    __slots__ = ("answered", "credit", "held", "local_end", "receive_window", "remote_end", "send_window")

    def __init__(self, send_window: int) -> None:
        self.send_window = send_window
        self.receive_window = limits.STREAM_WINDOW
        self.held = 0
        self.credit = 0  # taken, and not yet announced
        self.answered = False  # by the server; its next header block ends the stream
        self.local_end = False
        self.remote_end = False

    @property
    def ended(self) -> bool:
        """Returns True once both ends have sent their end."""
        return self.local_end and self.remote_end


class SessionCore:
    """`output` has the bytes to send, in order. The caller empties it after each call that may add to it."""

    def __init__(self, *, client: bool, now: float) -> None:
        """Starts the session: `output` has the preface and the settings."""
        self.client = client
        self.output: list[bytes] = []
        self.ping_answered = True
        self.window_opened = False  # since the caller last cleared it: streams that wait may send
        self.gone = False  # the peer has sent GOAWAY, or this end has
        self._splitter = FrameSplitter(preface=not client)
        self._streams: dict[int, _Stream] = {}
        self._send_window = frames.INITIAL_WINDOW
        self._receive_window = frames.INITIAL_WINDOW
        self._credit = limits.CONNECTION_WINDOW - frames.INITIAL_WINDOW
        self._initial_window = frames.INITIAL_WINDOW  # of the peer, for new streams
        self._last_remote = 0  # the last stream that the peer has opened
        self._last_local = -1 if client else 0
        self._resize = header_blocks.NO_TABLE  # to be sent before the next block
        self._idle = Budget(limits.IDLE_FRAMES, limits.IDLE_FRAMES_PER_SECOND, now)
        self._early = Budget(limits.EARLY_ENDS, limits.EARLY_ENDS_PER_SECOND, now)
        self._h2 = H2Connection(H2Configuration(client_side=client))
        self._h2.local_settings = _settings(client)
        self._h2.max_inbound_frame_size = limits.MAX_FRAME
        self._h2.decoder.max_header_list_size = limits.MAX_HEADERS
        self._blocks = BlockReader(self._h2.decoder)
        self._h2.initiate_connection()
        if not client:
            self._h2.receive_data(frames.PREFACE)  # the splitter takes the client's
        self._collect()
        self._grant()

    # What the peer sends

    def receive(self, view: memoryview, now: float) -> Iterator[Happening]:
        """Yields what has happened, in order; payloads are parts of `view`. Raises Http2Error: close with its code."""
        for frame in self._splitter.split(view):
            if isinstance(frame, Data):
                if self._receive_data(frame, now):
                    if frame.payload:
                        yield frame
                    if frame.ended and (stream := self._streams.get(frame.stream)) is not None:
                        yield from self._end_remote(frame.stream, stream)
                continue
            match frame.kind:
                case frames.WINDOW_UPDATE:
                    self._open_window(frame, now)
                case frames.GOAWAY:
                    yield self._go_away(frame)
                case frames.HEADERS | frames.CONTINUATION:
                    self._spend(now)
                    if (block := self._blocks.add(frame)) is not None:
                        yield from self._receive_headers(block, now)
                case frames.RST_STREAM:
                    self._spend(now)
                    yield from self._receive_reset(frame)
                case frames.PUSH_PROMISE:
                    raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the peer pushes a stream")
                case _:
                    self._spend(now)
                    self._pass_on(frame.raw)

    def _receive_data(self, frame: Data, now: float) -> bool:
        """Charges the windows; returns False if the stream is closed: its last bytes are dropped."""
        if not frame.charged:
            self._spend(now)
        self._receive_window -= frame.charged
        if self._receive_window < 0:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "the window of the connection is exceeded")
        stream = self._streams.get(frame.stream)
        if stream is None:
            if self._is_idle(frame.stream):
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"DATA on the idle stream {frame.stream}")
            self._credit += frame.charged
            self._grant()
            return False
        if stream.remote_end:
            raise Http2Error(ErrorCode.STREAM_CLOSED, f"DATA after the end of stream {frame.stream}")
        stream.receive_window -= frame.charged
        if stream.receive_window < 0:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, f"the window of stream {frame.stream} is exceeded")
        stream.held += frame.charged
        if padding := frame.charged - len(frame.payload):
            self.taken(frame.stream, padding)
        return True

    def _is_idle(self, number: int) -> bool:
        if number % 2 == self.client:
            return number > self._last_local
        return number > self._last_remote

    def _open_window(self, frame: Frame, now: float) -> None:
        self._spend(now)
        if len(frame.raw) != frames.HEADER_SIZE + 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another size")
        increment = int.from_bytes(frame.payload, "big") & frames.LARGEST_WINDOW
        stream = self._streams.get(frame.stream)
        if not increment or (frame.stream and stream is None and self._is_idle(frame.stream)):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing, or of an idle stream")
        if not frame.stream:
            self._send_window = _widen(self._send_window, increment)
        elif stream is not None:
            stream.send_window = _widen(stream.send_window, increment)
        self.window_opened = True

    def _go_away(self, frame: Frame) -> GoneAway:
        if len(frame.raw) < frames.HEADER_SIZE + 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of another size")
        self.gone = True
        last, code = struct.unpack_from(">LL", frame.raw, frames.HEADER_SIZE)
        # A client's number is that of the last stream of the server, which opens none.
        return GoneAway(last & _LARGEST_STREAM if self.client else _LARGEST_STREAM, code)

    def _pass_on(self, raw: bytes) -> None:
        """Lets h2 process a frame that concerns no stream. Raises Http2Error."""
        try:
            events = self._h2.receive_data(raw)
        except H2Error as error:
            self._h2.clear_outbound_data_buffer()  # its own GOAWAY: `close` sends one
            code = getattr(error, "error_code", ErrorCodes.PROTOCOL_ERROR)
            raise Http2Error(ErrorCode(code), str(error) or type(error).__name__) from None
        self._collect()
        for event in events:
            match event:
                case RemoteSettingsChanged():
                    self._follow_settings(event)
                case PingAckReceived():
                    self.ping_answered = True

    def _receive_headers(self, block: HeaderBlock, now: float) -> Iterator[Happening]:
        stream = self._streams.get(block.stream)
        if stream is None:
            if not self.client:
                yield from self._receive_request(block, now)
            elif block.stream % 2 == 0 or self._is_idle(block.stream):
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"the server opened the stream {block.stream}")
        elif stream.remote_end:
            raise Http2Error(ErrorCode.STREAM_CLOSED, f"HEADERS after the end of stream {block.stream}")
        elif self.client and not stream.answered:
            if (first(block.headers, b":status") or b"").startswith(b"1") and not block.ended:
                return  # an informational answer
            stream.answered = True
            stream.remote_end = block.ended
            yield Answered(block.stream, block.headers)
            if block.ended and block.stream in self._streams:
                yield from self._end_remote(block.stream, stream)
        elif block.ended:  # trailers
            yield from self._end_remote(block.stream, stream)
        else:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"HEADERS in the middle of stream {block.stream}")

    def _receive_request(self, block: HeaderBlock, now: float) -> Iterator[Happening]:
        number = block.stream
        if number % 2 == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"the client opened the stream {number}")
        if number <= self._last_remote:
            return  # it was reset, which the client did not know yet
        self._last_remote = number
        if len(self._streams) >= limits.STREAMS_PER_SESSION:
            live = sum(not stream.ended for stream in self._streams.values())
            if live >= limits.STREAMS_PER_SESSION:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"more than {live} streams")
        self._idle.add(limits.IDLE_FRAMES_PER_STREAM)
        self._spend(now, len(block.headers) // limits.FIELDS_PER_IDLE_FRAME)
        if not self._early.spend(now):  # `answer` gives it back
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many streams end before they begin")
        opened = self._streams[number] = _Stream(self._initial_window)
        opened.remote_end = block.ended
        yield Opened(number, block.headers)
        if block.ended and number in self._streams:
            yield from self._end_remote(number, opened)

    def _receive_reset(self, frame: Frame) -> Iterator[Happening]:
        if len(frame.raw) != frames.HEADER_SIZE + 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of another size")
        if frame.stream in self._streams:
            self._forget(frame.stream)
            yield Reset(frame.stream, int.from_bytes(frame.payload, "big"))
        elif self._is_idle(frame.stream) or not frame.stream:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM of the idle stream {frame.stream}")

    def _end_remote(self, number: int, stream: _Stream) -> Iterator[Happening]:
        stream.remote_end = True
        yield Ended(number)
        self._forget_ended(number)

    def _follow_settings(self, event: RemoteSettingsChanged) -> None:
        changed = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if changed is not None:
            difference = changed.new_value - self._initial_window
            self._initial_window = changed.new_value
            for stream in self._streams.values():
                stream.send_window = _widen(stream.send_window, difference)
        self.window_opened = True

    def _spend(self, now: float, count: int = 1) -> None:
        if not self._idle.spend(now, count):
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that carry no data")

    # What this end sends

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def most_streams(self) -> int:
        """Returns how many streams this end, a client, may have open; 0 if it may open no more."""
        if self.gone or self._last_local >= _LAST_NEW_STREAM:
            return 0
        return min(limits.POOLED_STREAMS, self._h2.remote_settings.max_concurrent_streams)

    def open(self, headers: Headers) -> int:
        """Sends a request; returns the stream's number. Call it only below `most_streams`."""
        number = self._last_local = self._last_local + 2
        self._send_headers(number, headers)
        self._streams[number] = _Stream(self._initial_window)
        self._idle.add(limits.IDLE_FRAMES_PER_STREAM)
        return number

    def _send_headers(self, number: int, headers: Headers, *, end: bool = False) -> None:
        block = self._resize + header_blocks.encode(headers)
        self._resize = b""
        self.output.append(frames.headers(number, block, self._h2.max_outbound_frame_size, end=end))

    def answer(self, number: int, headers: Headers, *, end: bool = False) -> None:
        """Answers a request; with `end` the stream ends, and what the client still sends is dropped."""
        stream = self._streams[number]
        self._send_headers(number, headers, end=end)
        if end:
            stream.local_end = True
            if not stream.remote_end:
                self.reset(number, ErrorCode.NO_ERROR)  # RFC 9113, 8.1
            self._forget_ended(number)
        else:
            self._early.add(1)

    def room(self, number: int) -> int:
        """Returns how many bytes one DATA frame of the stream may have now; 0 or less if it must wait."""
        stream = self._streams.get(number)
        if stream is None or stream.local_end:
            return 0
        return min(self._send_window, stream.send_window, self._h2.max_outbound_frame_size)

    def sent(self, number: int, count: int) -> None:
        """Notes a DATA frame that the caller has sent (see frames.write_data_header)."""
        self._send_window -= count
        self._streams[number].send_window -= count
        self._idle.add(count / limits.BYTES_PER_IDLE_FRAME)

    def taken(self, number: int, count: int) -> None:
        """Notes that the application has taken `count` received bytes: the peer may send as many again."""
        stream = self._streams.get(number)
        if stream is None:  # what was held is credited
            return
        stream.held -= count
        if stream.ended and not stream.held:
            self._forget(number)
        stream.credit += count
        if stream.credit >= limits.STREAM_WINDOW // _CREDIT and not stream.remote_end:
            self.output.append(frames.window_update(number, stream.credit))
            stream.receive_window += stream.credit
            stream.credit = 0
        self._credit += count
        if self._credit >= limits.CONNECTION_WINDOW // _CREDIT:
            self._grant()

    def _grant(self) -> None:
        if self._credit:
            self.output.append(frames.window_update(0, self._credit))
            self._receive_window += self._credit
            self._credit = 0

    def end(self, number: int) -> None:
        """Sends the end of the stream."""
        self._streams[number].local_end = True
        self.output.append(frames.end_of_stream(number))
        self._forget_ended(number)

    def reset(self, number: int, code: ErrorCode) -> None:
        """Gives up the stream, which is reset unless both ends have ended it."""
        if number in self._streams:
            stream = self._forget(number)
            if not stream.ended:
                self.output.append(frames.rst_stream(number, code))

    def ping(self) -> None:
        """Sends a PING; `ping_answered` is False until its answer comes."""
        self.ping_answered = False
        self._h2.ping(_PING)
        self._collect()

    def drain(self) -> None:
        """Asks the client to open no more streams. Those that are under way come before the answer to a PING."""
        self.output.append(frames.goaway(_LARGEST_STREAM, ErrorCode.NO_ERROR))
        self.ping()

    def close(self, code: ErrorCode) -> None:
        """Sends the last GOAWAY. Nothing may be sent after it."""
        self.gone = True
        self.output.append(frames.goaway(self._last_remote, code))

    def _forget_ended(self, number: int) -> None:
        stream = self._streams.get(number)
        if stream is not None and stream.ended and not stream.held:
            self._forget(number)

    def _forget(self, number: int) -> _Stream:
        stream = self._streams.pop(number)
        self._credit += stream.held
        if self._credit >= limits.CONNECTION_WINDOW // _CREDIT:
            self._grant()
        return stream

    def _collect(self) -> None:
        if made := self._h2.data_to_send():
            self.output.append(made)


@cache
def _settings(client: bool) -> Settings:
    """Returns the settings of this end, which never change, so all sessions share them: they take 5 KB."""
    values = {
        SettingCodes.INITIAL_WINDOW_SIZE: limits.STREAM_WINDOW,
        SettingCodes.MAX_FRAME_SIZE: limits.MAX_FRAME,
        SettingCodes.MAX_HEADER_LIST_SIZE: limits.MAX_HEADERS,
    }
    if client:
        values[SettingCodes.ENABLE_PUSH] = 0
    else:
        values[SettingCodes.MAX_CONCURRENT_STREAMS] = limits.STREAMS_PER_SESSION
    return Settings(client=client, initial_values=values)


def _widen(window: int, increment: int) -> int:
    if window + increment > frames.LARGEST_WINDOW:
        raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 31 bits")
    return window + increment
