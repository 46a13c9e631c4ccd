# SPDX-License-Identifier: Apache-2.0
"""What a receiver of ZDS does with each message, with started pods that are only remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from agent.core.errors import ProtocolError, ZtunnelError
from agent.kernel.netns import Netns, NetnsId
from agent.zds.messages import Add, Delete, Keep, SnapshotSent
from agent.ztunnel import workloads as module
from agent.ztunnel.workloads import Workloads


class FakeNetns:
    def __init__(self, inode: int) -> None:
        self.id, self.closed = NetnsId(4, inode, 0), False

    def close(self) -> None:
        self.closed = True


class FakePod:
    def __init__(self, netns: Netns) -> None:
        self.netns, self.closed = netns, False

    def close(self) -> None:
        self.closed = True
        self.netns.close()


class Scene:
    """`broken` makes every start fail."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.workloads = Workloads(loop, self.start)
        self.workloads.connected()
        self.broken = False
        self.started: list[FakePod] = []

    def start(self, add: Add, netns: Netns) -> FakePod:
        if self.broken:
            raise OSError(98, "Address already in use")
        self.started.append(FakePod(netns))
        return self.started[-1]

    def add(self, uid: str, inode: int = 1) -> Any:
        netns = FakeNetns(inode)
        self.workloads.handle(Add(uid, "web", "shop", "sa"), cast(Netns, netns))
        return netns

    def snapshot(self) -> None:
        self.workloads.handle(SnapshotSent(), None)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def scene(loop: asyncio.AbstractEventLoop) -> Scene:
    return Scene(loop)


def wait(loop: asyncio.AbstractEventLoop, until: Callable[[], bool]) -> None:
    async def waiting() -> None:
        while not until():  # noqa: ASYNC110 - the state itself is awaited
            await asyncio.sleep(0)

    loop.run_until_complete(asyncio.wait_for(waiting(), 10))


def test_it_is_complete_with_the_first_snapshot_and_stays_so(loop: asyncio.AbstractEventLoop) -> None:
    scene = Scene(loop)
    scene.add("a")
    assert not scene.workloads.complete.is_set()
    scene.snapshot()
    scene.workloads.connected()
    assert scene.workloads.complete.is_set()


def test_add_again_is_nothing_new(scene: Scene) -> None:
    first, second = scene.add("a"), scene.add("a")
    assert len(scene.started) == 1
    assert (first.closed, second.closed) == (False, True)


def test_another_namespace_starts_anew(scene: Scene) -> None:
    first, second = scene.add("a", 1), scene.add("a", 2)
    assert (first.closed, second.closed) == (True, False)
    assert scene.workloads.running["a"] is scene.started[1]


def test_snapshot_drops_the_unnamed(scene: Scene) -> None:
    for uid in "abc":
        scene.add(uid)
    scene.snapshot()
    scene.workloads.connected()
    scene.add("a")
    scene.workloads.handle(Keep("b"), None)
    assert len(scene.workloads.running) == 3
    scene.snapshot()
    assert set(scene.workloads.running) == {"a", "b"}
    assert scene.started[2].closed


def test_what_the_snapshot_forbids_afterwards(scene: Scene) -> None:
    scene.snapshot()
    for request in (SnapshotSent(), Keep("a")):
        with pytest.raises(ProtocolError):
            scene.workloads.handle(request, None)


def test_delete_of_running_pending_and_unknown(scene: Scene) -> None:
    scene.add("a")
    scene.broken = True
    with pytest.raises(ZtunnelError, match="in use"):
        scene.add("b")
    for uid in "abc":
        scene.workloads.handle(Delete(uid), None)
    assert not scene.workloads.running and not scene.workloads.pending
    assert scene.started[0].closed


def test_a_failed_start_is_tried_again(
    scene: Scene, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)
    scene.broken = True
    for uid in "ab":
        with pytest.raises(ZtunnelError):
            scene.add(uid)
    loop.run_until_complete(asyncio.sleep(0.01))
    assert set(scene.workloads.pending) == {"a", "b"}
    scene.broken = False
    wait(loop, lambda: set(scene.workloads.running) == {"a", "b"})
    assert not scene.workloads.pending


def test_a_new_connection_forgets_the_pending(scene: Scene) -> None:
    scene.broken = True
    with pytest.raises(ZtunnelError):
        scene.add("a")
    netns = cast(Any, scene.workloads.pending["a"][1])
    scene.workloads.connected()
    assert netns.closed and not scene.workloads.pending


def test_no_new_pods_at_the_end(scene: Scene) -> None:
    scene.workloads.leaving = True
    with pytest.raises(ZtunnelError, match="about to end"):
        scene.add("a")


def test_nothing_is_tried_again_at_the_end(
    scene: Scene, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)
    scene.broken = True
    with pytest.raises(ZtunnelError):
        scene.add("a")
    netns = cast(Any, scene.workloads.pending["a"][1])
    scene.broken, scene.workloads.leaving = False, True
    loop.run_until_complete(asyncio.sleep(0.01))
    assert not scene.started
    scene.workloads.close()
    assert netns.closed
