# SPDX-License-Identifier: Apache-2.0
"""The host's loop in a namespace that plays the host: what somebody flushes or reloads is back at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator

import pytest
from support.hostworld import PROBE, World, active, want, world

from agent.backends.hostprobes.claims import Claims
from agent.core.settings import Settings
from agent.reconciler.converge import settle
from agent.reconciler.host_loop import HostLoop

pytestmark = pytest.mark.root
A = "uid-a"
FLUSH = "nft flush ruleset"


class Journal:
    """What the loop told, with a wait for repairs."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.errors: list[Exception] = []
        self.repaired = asyncio.Event()

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        if cause:
            self.causes.append(cause)
            self.repaired.set()

    def host_failed(self, error: Exception) -> None:
        self.errors.append(error)


@pytest.fixture
def node() -> Iterator[World]:
    with world() as made:
        yield made


@contextlib.asynccontextmanager
async def running(
    node: World, *, owned: bool = False, verify_seconds: float = 3600
) -> AsyncIterator[tuple[HostLoop, Journal]]:
    """A loop that looks again only when it is told to, unless `verify_seconds` says otherwise."""
    settings, journal = Settings(verify_seconds=verify_seconds), Journal()
    layers = active(owned=owned)
    loop = HostLoop(
        settings=settings,
        mechanism="nftables",
        active=layers,
        retired=(),
        target=node.target,
        journal=journal,
        random=random.random,
    )
    task = asyncio.create_task(loop.run())
    try:
        yield loop, journal
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_p12_firewalld_reload_does_not_lose_the_exemption(node: World) -> None:
    """Found by the kernel's own notification."""

    async def main() -> None:
        async with running(node) as (loop, journal):
            loop.claim(A, node.a.both)
            status = await loop.settled()
            assert status.ok and status.members == 2 and status.repairs == 0 and not journal.errors
            for count in range(1, 4):
                journal.repaired.clear()
                await asyncio.to_thread(node.host.sh, FLUSH)
                await asyncio.wait_for(journal.repaired.wait(), 20)
                assert (await loop.settled()).repairs >= count
                for family in (4, 6):
                    assert await asyncio.to_thread(node.host.connect, node.a.address(family)) == PROBE[family]
            assert not journal.errors
            assert all(cause.startswith("nft") for cause in journal.causes)

    asyncio.run(main())


def test_p12_no_connection_fails_while_rules_are_flushed_and_put_back(node: World) -> None:
    """There are no guard rules that drop: at worst a probe has the node's own address for a moment."""

    async def main() -> None:
        async with running(node, verify_seconds=0.05) as (loop, journal):
            loop.claim(A, node.a.both)
            await loop.settled()
            seen = set()
            for _ in range(10):
                flush = asyncio.create_task(asyncio.to_thread(node.host.sh, FLUSH))
                seen.add(await asyncio.to_thread(node.host.connect, node.a.address(4)))
                await flush
                await asyncio.wait_for(journal.repaired.wait(), 20)
            assert seen <= {PROBE[4], node.a.host(4)}
            await loop.settled()
            assert await asyncio.to_thread(node.host.connect, node.a.address(4)) == PROBE[4]

    asyncio.run(main())


def test_our_own_changes_wake_nobody_and_others_are_named(node: World) -> None:
    layers, claims = active(), Claims()
    for number in range(3):
        claims.claim(f"uid-{number}", [f"192.0.2.{number + 1}"])
        assert settle(node.target, want(claims), layers).applied
        assert node.target.changed() == ""
    node.host.sh("nft add table inet other; nft delete table inet other")
    assert node.target.changed().startswith("nft[")
    assert node.target.changed() == ""


def test_p13_a_new_agent_takes_nobodys_entry_before_all_have_claimed(node: World) -> None:
    async def first() -> None:
        async with running(node) as (loop, _):
            loop.claim(A, node.a.both)
            loop.claim("uid-b", node.b.both)
            loop.complete()
            assert (await loop.settled()).members == 4

    async def second() -> None:
        async with running(node) as (loop, _):
            await loop.settled()
            assert len(node.members()) == 4
            loop.claim(A, node.a.both)
            await loop.settled()
            assert len(node.members()) == 4
            assert await asyncio.to_thread(node.host.connect, node.b.address(4)) == PROBE[4]
            loop.complete()
            await loop.settled()
            assert node.members() == dict.fromkeys(node.a.both, A)

    asyncio.run(first())
    node.reopen()
    asyncio.run(second())


def test_what_ends_is_left_as_it_is_and_removed_when_asked(node: World) -> None:
    before = node.dump()

    async def main() -> None:
        async with running(node) as (loop, _):
            loop.claim(A, node.a.both)
            await loop.settled()
            assert await loop.inspect() == {}

    asyncio.run(main())
    assert node.host.connect(node.a.address(4)) == PROBE[4]
    settle(node.target, None, active())
    assert node.dump() == before
