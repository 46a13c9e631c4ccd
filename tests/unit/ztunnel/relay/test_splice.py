# SPDX-License-Identifier: Apache-2.0
"""One direction of the relay over socket pairs: order, back-pressure, end, failure."""

from __future__ import annotations

import os
import socket

import pytest

from agent.ztunnel.relay import splice
from agent.ztunnel.relay.splice import Half


@pytest.fixture
def ends():  # type: ignore[no-untyped-def]
    """Returns (sender, half, receiver)."""
    sender, source = socket.socketpair()
    sink, receiver = socket.socketpair()
    for one in (sender, source, sink, receiver):
        one.setblocking(False)
    half = Half(source, sink)
    yield sender, half, receiver
    half.close()
    for one in (sender, source, sink, receiver):
        one.close()


def test_short_exchanges_need_no_pipe(ends) -> None:  # type: ignore[no-untyped-def]
    sender, half, receiver = ends
    sender.send(b"hello")
    assert not half.pump()
    assert receiver.recv(10) == b"hello"
    assert (half.moved, half.pipe, half.finished) == (5, None, False)


def test_end_behind_data(ends) -> None:  # type: ignore[no-untyped-def]
    sender, half, receiver = ends
    sender.send(b"bye")
    sender.shutdown(socket.SHUT_WR)
    half.ended = True  # as the event says
    half.pump()
    assert half.finished
    assert receiver.recv(10) == b"bye"
    assert receiver.recv(10) == b""


def test_full_sink_stops_reading_and_loses_nothing(ends) -> None:  # type: ignore[no-untyped-def]
    sender, half, receiver = ends
    data, sent, got = os.urandom(8 << 20), 0, bytearray()
    while len(got) < len(data):
        try:
            while sent < len(data):
                sent += sender.send(data[sent : sent + 65536])
        except BlockingIOError:
            pass
        while half.pump():
            pass
        assert half.buffered <= splice.PIPE_SIZE
        try:
            while True:
                got += receiver.recv(30000)
        except BlockingIOError:
            pass
    assert bytes(got) == data
    assert half.moved == len(data)


def test_a_sink_that_is_gone_is_an_error(ends) -> None:  # type: ignore[no-untyped-def]
    sender, half, receiver = ends
    receiver.close()
    sender.send(b"x")
    with pytest.raises(BrokenPipeError):
        half.pump()


def test_urgent_data_that_comes_with_the_end_is_not_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        source, _ = server.accept()
        sink, receiver = socket.socketpair()
        with source, sink, receiver:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sender.send(b"!", socket.MSG_OOB)
            sender.shutdown(socket.SHUT_WR)
            assert source.recv(1, socket.MSG_PEEK) == b"!"
            for one in (source, sink, receiver):
                one.setblocking(False)
            half = Half(source, sink)
            half._open_pipe()  # a stream by now, and no event has told of the urgent data yet
            half.ended = True
            while half.pump():
                pass
            assert receiver.recv(10) == b"!"
            assert half.finished
            half.close()


def test_a_call_after_the_end_changes_nothing() -> None:
    """The sink may have ended in the meantime, too: another FIN would be an error (ENOTCONN), and then a reset."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender, sink = socket.create_connection(server.getsockname()), socket.create_connection(server.getsockname())
        (source, _), (receiver, _) = server.accept(), server.accept()
    with sender, source, sink, receiver:
        half = Half(source, sink)
        sender.close()
        assert source.recv(1, socket.MSG_PEEK) == b""
        source.setblocking(False)
        half.pump()
        assert half.finished
        assert receiver.recv(1) == b""
        receiver.close()
        assert sink.recv(1) == b""
        assert half.pump() is False
        half.close()
