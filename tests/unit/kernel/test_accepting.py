# SPDX-License-Identifier: Apache-2.0
"""Limits of connections: who counts as one, and what is logged how often."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest

from agent.kernel import accepting
from agent.kernel.accepting import Limits, Seldom, accept, host, strangers


@pytest.mark.parametrize(
    ("address", "key"),
    [
        (("10.0.0.1", 4711), "10.0.0.1"),
        (("::ffff:10.0.0.1", 4711, 0, 0), "10.0.0.1"),
        (("2001:db8::1:2:3:4", 4711, 0, 0), "2001:db8::/64"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80::/64"),
        (("::1", 4711, 0, 0), "::/64"),
        ("", ""),
        (b"", ""),
    ],
)
def test_who_a_peer_stands_for(address: Any, key: str) -> None:
    assert host(address) == key


def test_one_kind_of_event_is_logged_once_a_minute_with_how_many_there_were(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("agent.kernel.accepting.time.monotonic", lambda: now)
    seldom = Seldom(logging.ERROR)
    for _ in range(1000):
        seldom.log("no descriptor left")
    now += 61
    seldom.log("no descriptor left")
    assert [one.getMessage() for one in caplog.records] == [
        "no descriptor left",
        "no descriptor left (1000 times since this was logged last)",
    ]


def test_an_accept_that_keeps_failing_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherTask(Exception):
        """Another task's turn."""

    class Once(Seldom):
        def log(self, words: str) -> None:
            assert not self._count, "tried again at once"
            super().log(words)

    async def sleep(_: float) -> None:
        raise OtherTask

    monkeypatch.setattr(accepting.asyncio, "sleep", sleep)
    with socket.socket() as deaf, pytest.raises(OtherTask):  # it does not listen: EINVAL
        deaf.setblocking(False)
        once = Once()
        monkeypatch.setattr(once, "_next", float("inf"))
        asyncio.run(accept(deaf, once))


def test_a_connection_that_meets_a_defect_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    served = 0

    async def handle(sock: socket.socket) -> None:
        nonlocal served
        served += 1
        raise ConnectionResetError if served == 1 else ValueError("a defect")

    async def script() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(strangers(listener, Limits(9, 9), handle))
        for _ in range(3):
            with socket.create_connection(listener.getsockname()) as client:
                client.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        serving.cancel()

    asyncio.run(script())
    assert served == 3 and len(caplog.records) == 2
