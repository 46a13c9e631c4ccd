# SPDX-License-Identifier: Apache-2.0
"""Events once per edge, errors unasked, and deadlines in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any

from agent.ztunnel.relay import poller
from agent.ztunnel.relay.poller import Deadlines, Poller


def play(scene: Callable[[Poller], Coroutine[Any, Any, None]]) -> None:
    events = Poller()
    with asyncio.Runner(loop_factory=lambda: events.loop) as runner:
        runner.run(asyncio.wait_for(scene(events), 10))


def test_a_reset_is_told_to_one_who_does_not_read() -> None:
    async def scene(events: Poller) -> None:
        masks: asyncio.Queue[int] = asyncio.Queue()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
            client.connect(server.getsockname())
            end, _ = server.accept()
            with end:
                events.add(end.fileno(), masks.put_nowait)
                assert await masks.get() & poller.WRITE
                client.send(b"unread")
                assert await masks.get() & poller.READ
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                client.close()
                assert await masks.get() & poller.ERROR
                events.remove(end.fileno())

    play(scene)


def test_many_events_of_one_pod_do_not_keep_the_loop_from_others() -> None:
    async def scene(events: Poller) -> None:
        seen, pairs = list[int](), [socket.socketpair() for _ in range(64)]
        for one, _ in pairs:
            events.add(one.fileno(), seen.append)
        counts = list[int]()
        while len(seen) < len(pairs):
            await asyncio.sleep(0)
            counts.append(len(seen))
        assert len(counts) >= len(pairs) // poller._EVENTS, "somebody else had a turn after each few"
        for pair in pairs:
            for end in pair:
                end.close()

    play(scene)


def test_a_failing_handler_does_not_lose_the_others() -> None:
    async def scene(events: Poller) -> None:
        complaints: list[object] = []
        events.loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        told = asyncio.Event()
        one, other = socket.socketpair()
        with one, other:
            events.add(one.fileno(), lambda mask: 1 // 0)
            events.add(other.fileno(), lambda mask: told.set())
            await told.wait()
        assert isinstance(complaints[0], ZeroDivisionError)

    play(scene)


def test_what_is_registered_in_a_batch_gets_no_event_of_its_predecessor() -> None:
    """Two sockets have events; the handler of either closes both and registers new ones under their numbers."""

    async def scene(events: Poller) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        fresh: list[socket.socket] = []
        masks: asyncio.Queue[int] = asyncio.Queue()

        def replace(_: int) -> None:
            if fresh:
                return
            for one, other in pairs:
                events.remove(one.fileno())
                one.close()
                other.close()
            for _ in pairs:
                fresh.extend(socket.socketpair())
                events.add(fresh[-2].fileno(), masks.put_nowait)

        for one, other in pairs:
            events.add(one.fileno(), replace)
            other.send(b"x")
        assert not [mask for mask in (await masks.get(), await masks.get()) if mask & poller.READ]
        for one in fresh:
            one.close()

    play(scene)


def test_asyncio_runs_on_the_poller() -> None:
    """Streams, timers, signals and calls of other threads, next to handlers."""

    async def scene(events: Poller) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(3) * 100_000)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"abc")
        assert await reader.readexactly(300_000) == b"abc" * 100_000
        writer.close()
        server.close()
        asked = asyncio.Event()
        events.loop.add_signal_handler(signal.SIGUSR1, asked.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asked.wait()
        assert await asyncio.to_thread(lambda: 7) == 7
        before = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - before >= 0.01

    play(scene)


class Waiter:
    def __init__(self, log: list[Waiter]) -> None:
        self.log = log

    def expire(self) -> None:
        self.log.append(self)


def test_deadlines_expire_in_order_and_only_what_still_waits() -> None:
    async def scene() -> None:
        log: list[Waiter] = []
        deadlines = Deadlines(asyncio.get_running_loop(), 0.01)
        waiters = [Waiter(log) for _ in range(5)]
        for waiter in waiters:
            deadlines.add(waiter)
        deadlines.settle(waiters[0])
        deadlines.settle(waiters[3])
        while len(log) < 3:  # noqa: ASYNC110 - the state itself is awaited
            await asyncio.sleep(0)
        assert log == [waiters[1], waiters[2], waiters[4]]
        deadlines.add(waiters[0])
        while len(log) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert log[3] is waiters[0]

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_a_failing_deadline_does_not_keep_the_others_waiting() -> None:
    class Failing(Waiter):
        def expire(self) -> None:
            raise ZeroDivisionError

    async def scene() -> None:
        loop, log = asyncio.get_running_loop(), list[Waiter]()
        complaints: list[object] = []
        loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        deadlines, other = Deadlines(loop, 0.01), Waiter(log)
        deadlines.add(Failing(log))
        deadlines.add(other)
        while not log:  # noqa: ASYNC110 - the state itself is awaited
            await asyncio.sleep(0)
        assert log == [other]
        assert isinstance(complaints[0], ZeroDivisionError)

    asyncio.run(asyncio.wait_for(scene(), 10))
