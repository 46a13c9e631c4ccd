# SPDX-License-Identifier: Apache-2.0
"""The host's loop against mechanisms that fail: retried, told of, and nobody kept waiting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from agent.backends.base import Support
from agent.backends.hostprobes.want import HostProbes
from agent.core.errors import KernelError, StaleError
from agent.core.model.plan import Plan, Step
from agent.core.settings import Settings
from agent.reconciler.converge import PASSES, settle
from agent.reconciler.host_loop import HostLoop


class Host:
    """What the loop needs of a HostNetns; `notify` is what a foreign change does."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.events, self.cause = SimpleNamespace(socket=self.ours), ""

    def notify(self, cause: str) -> None:
        self.cause = cause
        self._theirs.send(b"x")

    def changed(self) -> str:
        self.ours.recv(100)
        return self.cause

    def has_ipv6(self) -> bool:
        return True

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()


class Fake:
    """A mechanism whose kernel is one value; `errors` are raised by the next applications."""

    def __init__(self, log: list[str] | None = None, name: str = "fake") -> None:
        self.name, self.held, self.errors, self.applied = name, object(), list[Exception](), threading.Event()
        self.log = [] if log is None else log

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: Any) -> Any:
        return self.held

    def plan(self, want: HostProbes | None, have: Any) -> Plan[Any]:
        wanted = None if want is None else dict(want.members)
        return Plan() if wanted == have else Plan((Step("make it so", wanted),), ("it is not so",))

    def apply(self, target: Any, plan: Plan[Any]) -> None:
        self.log.append(self.name)
        if self.errors:
            raise self.errors.pop(0)
        self.held = plan.steps[0].payload
        self.applied.set()


class Journal:
    def __init__(self) -> None:
        self.causes, self.failures = list[str](), list[str]()

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self.causes.append(cause)

    def host_failed(self, error: Exception) -> None:
        self.failures.append(str(error))


@pytest.fixture
def host() -> Iterator[Any]:
    made = Host()
    yield made
    made.close()


@contextlib.asynccontextmanager
async def running(host: Any, *layers: Any, retired: tuple[Any, ...] = ()) -> Any:
    settings = Settings(verify_seconds=3600)
    loop = HostLoop(
        settings=settings,
        mechanism="fake",
        active=layers,
        retired=retired,
        target=host,
        journal=(journal := Journal()),
        random=lambda: 0.0,
    )
    task = asyncio.create_task(loop.run())
    try:
        yield loop, journal
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_a_failure_is_told_and_tried_again(host: Any) -> None:
    fake = Fake()
    fake.errors = [KernelError("apply", 1, "no"), KernelError("apply", 1, "still no")]

    async def main() -> None:
        async with running(host, fake) as (loop, journal):
            status = await loop.settled()
            assert not status.ok and status.error == "apply: no" and status.retry is not None and status.verified == 0
            assert await asyncio.to_thread(fake.applied.wait, 20)  # nobody wakes it: the backoff does
            await loop.settled()
            assert journal.failures == ["apply: no", "apply: still no"]
            assert loop.status.error == "" and loop.status.retry is None and loop.status.verified > 0

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_change_is_made_at_once_and_a_foreign_one_is_a_repair(host: Any) -> None:
    fake = Fake()

    async def main() -> None:
        async with running(host, fake) as (loop, journal):
            assert (await loop.settled()).ok
            loop.claim("a", ["10.0.0.1"])
            assert (await loop.settled()).repairs == 0 and fake.held == {"10.0.0.1": "a"}
            fake.held = {}
            fake.applied.clear()
            host.notify("nft[4711]")
            assert await asyncio.to_thread(fake.applied.wait, 20)
            assert (await loop.settled()).repairs == 1
            assert fake.held == {"10.0.0.1": "a"} and journal.causes == ["", "", "nft[4711]"]
            loop.release("a")
            await loop.settled()
            assert fake.held == {}

    asyncio.run(asyncio.wait_for(main(), 20))


def test_layers_are_removed_backwards_and_retired_ones_once(host: Any) -> None:
    log: list[str] = []
    one, two, old = Fake(log, "one"), Fake(log, "two"), Fake(log, "old")

    async def main() -> None:
        async with running(host, one, two, retired=(old,)) as (loop, _):
            await loop.settled()
            assert log == ["one", "two", "old"] and old.held is None
            old.held = {"somebody": "else"}
            loop.claim("a", ["10.0.0.1"])
            await loop.settled()
            assert log == ["one", "two", "old", "one", "two"]

    asyncio.run(asyncio.wait_for(main(), 20))
    log.clear()
    settle(host, None, (one, two))
    assert log == ["two", "one"]


def test_a_race_is_looked_at_again_and_one_without_end_is_an_error(host: Any) -> None:
    fake, want = Fake(), HostProbes({}, probe_ipv4="192.0.2.1", probe_ipv6="2001:db8::1")
    fake.errors = [StaleError("apply", 85, "changed")] * (PASSES - 2)
    assert len(settle(host, want, (fake,)).applied) == 1
    fake.held, fake.errors = object(), [StaleError("apply", 85, "changed")] * PASSES
    with pytest.raises(KernelError, match="changed again"):
        settle(host, want, (fake,))
