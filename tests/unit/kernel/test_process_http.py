# SPDX-License-Identifier: Apache-2.0
"""Pages of another process: here one in this network namespace."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from agent.core.errors import SluiceError
from agent.kernel import process_http
from agent.kernel.process_http import page


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def answering(listener: socket.socket, answer: bytes) -> threading.Thread:
    """A server of one request."""

    def serve() -> None:
        link, _ = listener.accept()
        with link:
            assert link.recv(4096).startswith(b"GET /page HTTP/1.1\r\n")
            link.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_the_body(listener: socket.socket) -> None:
    thread = answering(listener, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    assert page(os.getpid(), port(listener), "/page") == b"hello"
    thread.join()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000, "more than 1 MiB"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (b"", "Remote end closed connection without response"),
    ],
)
def test_what_is_no_page(listener: socket.socket, answer: bytes, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_http, "MOST_BYTES", 1 << 20)
    thread = answering(listener, answer)
    with pytest.raises(SluiceError) as raised:
        page(os.getpid(), port(listener), "/page")
    thread.join()
    assert str(raised.value).startswith(f"process {os.getpid()}, 127.0.0.1:{port(listener)}/page: ")
    assert error in str(raised.value)


def test_a_server_that_is_silent_or_away(listener: socket.socket) -> None:
    with pytest.raises(SluiceError, match="timed out"):
        page(os.getpid(), port(listener), "/page", 0.1)
    number = port(listener)
    listener.close()
    with pytest.raises(SluiceError, match="Connection refused"):
        page(os.getpid(), number, "/page")


def test_a_process_that_has_ended() -> None:
    with pytest.raises(SluiceError, match="No such file or directory"):
        page(1 << 30, 80, "/page")
