# SPDX-License-Identifier: Apache-2.0
"""Messages between supervisor and worker: in order, of any size, with descriptors, and bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from agent.ztunnel.workers.worker_channel import INLINE, WorkerChannel

Got = list[tuple[Any, list[int]]]


class Ends:
    """Both ends; what the second one got."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.got: Got = []
        self.ended = asyncio.Event()
        self._arrived = asyncio.Event()
        self.one = WorkerChannel(loop, one, lambda *_: None, lambda: None)
        self.other = WorkerChannel(loop, other, self._receive, self.ended.set)

    async def wait(self, number: int) -> None:
        async with asyncio.timeout(10):
            while len(self.got) < number:
                await self._arrived.wait()
                self._arrived.clear()

    def _receive(self, message: Any, fds: list[int]) -> None:
        self.got.append((message, fds))
        self._arrived.set()


def run(steps: Callable[[Ends], Coroutine[Any, Any, None]]) -> None:
    async def all_steps() -> None:
        ends = Ends()
        await steps(ends)
        ends.one.close()
        ends.other.close()

    asyncio.run(all_steps())


def test_messages_of_any_size_keep_their_order() -> None:
    sizes = [1, INLINE, 3, 5 << 20, 7, *range(2000)]  # more than the socket holds

    async def steps(ends: Ends) -> None:
        for size in sizes:
            ends.one.send(bytes(size))
        assert ends.one.waiting > 0
        ends.other.start()
        await ends.wait(len(sizes))
        assert [len(message) for message, _ in ends.got] == sizes
        assert ends.one.waiting == 0

    run(steps)


def test_descriptors_come_with_their_message() -> None:
    async def steps(ends: Ends) -> None:
        reading, writing = os.pipe()
        ends.one.send("plain")
        ends.one.send("with", lambda: (writing,))
        ends.one.send(bytes(INLINE), lambda: (reading, writing))
        ends.other.start()
        await ends.wait(3)
        assert [len(fds) for _, fds in ends.got] == [0, 1, 2]
        for _, fds in ends.got:
            for fd in fds:
                assert os.fstat(fd).st_ino == os.fstat(reading).st_ino
                os.close(fd)
        os.close(reading)
        os.close(writing)

    run(steps)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limit[1]))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.eventfd(0))
        yield


def test_without_descriptors_no_message_is_lost_but_its_descriptors_are() -> None:
    async def steps(ends: Ends) -> None:
        reading, writing = os.pipe()
        ends.other.start()
        with no_descriptor_left():
            for number in range(1, 4):
                ends.one.send(bytes(INLINE))
                ends.one.send("one", lambda: (writing,))
                ends.one.send("two", lambda: (reading, writing))
                await ends.wait(3 * number)
        assert [(len(message), fds) for message, fds in ends.got] == [(INLINE, []), (3, []), (3, [])] * 3
        ends.one.send("two", lambda: (reading, writing))
        await ends.wait(10)
        assert len(ends.got[-1][1]) == 2
        for fd in (reading, writing, *ends.got[-1][1]):
            os.close(fd)

    run(steps)


def test_a_message_that_cannot_be_sent_ends_the_other_end() -> None:
    async def steps(ends: Ends) -> None:
        ends.other.start()
        ends.one.send("first")
        ends.one.send("second", lambda: (1 << 30,))  # no descriptor
        ends.one.send("third")
        await asyncio.wait_for(ends.ended.wait(), 10)
        assert [message for message, _ in ends.got] == ["first"]

    run(steps)


def test_what_is_out_of_date_when_its_turn_comes_is_not_sent() -> None:
    async def steps(ends: Ends) -> None:
        ends.one.send("gone", lambda: None)
        ends.one.send("here")
        ends.other.start()
        await ends.wait(1)
        assert [message for message, _ in ends.got] == ["here"]

    run(steps)


def test_the_end_comes_after_everything_that_was_sent() -> None:
    async def steps(ends: Ends) -> None:
        ends.other.start()
        ends.one.send("last")
        ends.one.close()
        await asyncio.wait_for(ends.ended.wait(), 10)
        assert [message for message, _ in ends.got] == ["last"]

    run(steps)


def test_sending_to_an_end_that_is_closed_is_no_error() -> None:
    async def steps(ends: Ends) -> None:
        ends.other.start()
        ends.other.close()
        ends.one.send("lost")
        assert ends.one.waiting == 0

    run(steps)


def test_others_get_their_turn_while_messages_wait() -> None:
    async def all_steps() -> None:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        turn = 0
        handled: list[int] = []

        def handle(_message: Any, _fds: list[int]) -> None:
            handled.append(turn)
            time.sleep(0.002)

        ends = [
            WorkerChannel(asyncio.get_running_loop(), end, handle, lambda: None) for end in (one, other)
        ]  # fmt: skip
        for number in range(50):
            ends[0].send(number)
        ends[1].start()
        while len(handled) < 50:
            turn += 1
            await asyncio.sleep(0)
        assert len(set(handled)) > 10
        for end in ends:
            end.close()

    asyncio.run(all_steps())
