# SPDX-License-Identifier: Apache-2.0
"""relay.c with real sockets: what it copies itself, and what it leaves to Python."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel import pair_copier
from agent.kernel.pair_copier import BATCH, CHUNK, PairCopier

SOURCES = Path(__file__).parents[3] / "relay"
EDGES = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("relay")
    subprocess.run(["make", "-s", "-C", SOURCES, f"OUT={folder}"], check=True)
    return ctypes.CDLL(str(folder / "relay.so"), use_errno=True)


class Scene:
    """Pairs of sockets in the copier; each has an application at either end."""

    def __init__(self, library: ctypes.CDLL, made: contextlib.ExitStack) -> None:
        self.copier = PairCopier(library)
        self.epoll = made.enter_context(select.epoll())
        self.left: list[tuple[int, bytes, int]] = []
        self._made = made

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """(an application's socket, its peer, which is in the epoll set)."""
        one, other = (self._made.enter_context(each) for each in socket.socketpair())
        other.setblocking(False)
        self.epoll.register(other, EDGES)
        return one, other

    def pair(self) -> tuple[socket.socket, socket.socket, socket.socket, socket.socket]:
        """(client, the two of the pair, server); the first events have been."""
        (client, one), (server, other) = self.sockets(), self.sockets()
        self.epoll.poll(0)
        assert self.copier.add(one.fileno(), other.fileno(), lambda *left: self.left.append(left))
        return client, one, other, server

    def poll(self, seconds: float = 0) -> list[tuple[int, int]]:
        return self.copier.poll(self.epoll.fileno(), seconds)


@pytest.fixture
def scene(library: ctypes.CDLL) -> Iterator[Scene]:
    with contextlib.ExitStack() as made:
        yield Scene(library, made)


def fill(sink: socket.socket) -> int:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sink.send(bytes(1 << 16))
    return sent


def test_short_exchanges_are_copied_both_ways(scene: Scene) -> None:
    client, one, other, server = scene.pair()
    for number in range(20):
        client.send(b"question" * number or b"?")
        server.send(b"answer")
        assert scene.poll(0.001) == []
        assert server.recv(1000) == (b"question" * number or b"?")
        assert client.recv(1000) == b"answer"
    assert scene.left == []
    assert scene.copier.moved(one.fileno()) == 8 * sum(range(20)) + 1
    assert scene.copier.remove(other.fileno()) == 6 * 20


def test_a_read_that_fills_the_buffer_is_left_after_it(scene: Scene) -> None:
    client, one, other, server = scene.pair()
    client.send(b"x" * CHUNK + b"more")
    assert [fd for fd, _ in scene.poll()] == [one.fileno()]
    assert scene.left == [(one.fileno(), b"", 0)]
    assert len(server.recv(2 * CHUNK)) == CHUNK and one.recv(10) == b"more"
    assert scene.copier.remove(one.fileno()) == CHUNK and scene.copier.remove(other.fileno()) == 0


def test_what_a_full_sink_does_not_take_is_left(scene: Scene) -> None:
    client, one, other, _ = scene.pair()
    fill(other)
    client.send(b"rest")
    assert [fd for fd, _ in scene.poll()] == [one.fileno()]
    assert scene.left == [(one.fileno(), b"rest", 0)] and scene.copier.moved(one.fileno()) == 0


def test_what_a_sink_takes_in_part_is_left_in_part(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sink = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
    with sink, server:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sink.setblocking(False)
        client, one = scene.sockets()
        scene.epoll.poll(0)
        assert scene.copier.add(one.fileno(), sink.fileno(), lambda *left: scene.left.append(left))
        data = bytes(range(250)) * 64
        client.send(data)
        assert scene.poll()
        ((source, rest, error),) = scene.left
        moved = scene.copier.moved(source)
        assert 0 < moved < len(data) and rest == data[moved:] and not error
        sink.close()
        taken = b""
        while part := server.recv(len(data)):
            taken += part
        assert taken == data[:moved]


def test_an_end_is_left_unread(scene: Scene) -> None:
    client, one, _, _ = scene.pair()
    client.send(b"last")
    client.shutdown(socket.SHUT_WR)
    ((fd, mask),) = scene.poll()
    assert fd == one.fileno() and mask & select.EPOLLRDHUP and scene.left == []
    assert one.recv(10) == b"last" and one.recv(10) == b""


def test_an_error_of_the_sink_is_left(scene: Scene) -> None:
    client, one, _, server = scene.pair()
    client.send(b"nobody reads it")
    server.close()
    assert len(scene.poll()) == 2
    assert scene.left == [(one.fileno(), b"", errno.EPIPE)]


def test_the_rest_of_a_batch_is_left_as_soon_as_the_buffer_is_in_use(scene: Scene) -> None:
    pairs = [scene.pair() for _ in range(3)]
    for client, *_ in pairs:
        client.send(b"x" * CHUNK)
    ready = {fd for fd, _ in scene.poll()}
    assert len(scene.left) == 1 and ready == {one.fileno() for _, one, _, _ in pairs}
    lengths = sorted(len(one.recv(2 * CHUNK)) for _, one, _, _ in pairs if one.fileno() != scene.left[0][0])
    assert lengths == [CHUNK, CHUNK]


def test_events_of_others_pass(scene: Scene) -> None:
    client, one, other, server = scene.pair()
    stranger, foreign = scene.sockets()
    assert [fd for fd, _ in scene.poll()] == [foreign.fileno()]
    stranger.send(b"x")
    client.send(b"y")
    assert [(fd, mask & select.EPOLLIN) for fd, mask in scene.poll()] == [(foreign.fileno(), select.EPOLLIN)]
    assert server.recv(1) == b"y"
    scene.copier.remove(one.fileno())
    scene.copier.remove(other.fileno())
    assert not scene.copier.pairs
    client.send(b"z")
    assert one.fileno() in [fd for fd, _ in scene.poll()] and one.recv(1) == b"z"


def test_many_ready_pairs_take_several_batches(scene: Scene) -> None:
    pairs = [scene.pair() for _ in range(3 * BATCH)]
    for client, *_ in pairs:
        client.send(b"x")
    for _ in range(3):  # one suffices, unless its time is over before
        assert scene.poll(0.001) == []
    assert all(server.recv(1) == b"x" for *_, server in pairs)


def test_errors_and_descriptors_beyond_the_table(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"Bad file descriptor"):
        scene.copier.poll(-1, 0)
    monkeypatch.setattr(pair_copier, "_DESCRIPTORS", 3)
    assert not scene.copier.add(2, 3, lambda *left: None) and not scene.copier.pairs


def test_without_the_library_there_is_no_copier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pair_copier, "LIBRARY", tmp_path / "relay.so")
    assert pair_copier.pair_copier() is None
