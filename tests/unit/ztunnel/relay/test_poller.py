# SPDX-License-Identifier: Apache-2.0
"""Events once per edge, errors unasked, and deadlines in order."""

from __future__ import annotations

import asyncio
import socket
import struct

from agent.ztunnel.relay import poller
from agent.ztunnel.relay.poller import Deadlines, Poller


def test_a_reset_is_told_to_one_who_does_not_read() -> None:
    async def scene() -> None:
        events = Poller(asyncio.get_running_loop())
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
        events.close()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_many_events_of_one_pod_do_not_keep_the_loop_from_others() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        events, seen, pairs = Poller(loop), list[int](), [socket.socketpair() for _ in range(64)]
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
        events.close()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_a_failing_handler_does_not_lose_the_others() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        complaints: list[object] = []
        loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        events, told = Poller(loop), asyncio.Event()
        one, other = socket.socketpair()
        with one, other:
            events.add(one.fileno(), lambda mask: 1 // 0)
            events.add(other.fileno(), lambda mask: told.set())
            await told.wait()
        events.close()
        assert isinstance(complaints[0], ZeroDivisionError)

    asyncio.run(asyncio.wait_for(scene(), 10))


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
