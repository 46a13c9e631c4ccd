# SPDX-License-Identifier: Apache-2.0
"""The agent's end of ZDS with scripted ztunnels on plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.core.errors import ZtunnelError
from agent.core.model.pods import Pod
from agent.kernel.process import Process
from agent.zds import messages
from agent.zds.messages import Ack, Add, Hello, SnapshotSent, encode
from agent.zds.server import ZdsServer

SOON = 0.15  # seconds, for the tests in which an answer never comes
LATE = 20.0  # for all others: never reached


def pod(name: str, account: str = "") -> Pod:
    return Pod(uid=f"uid-{name}", namespace="shop", name=name, service_account=account)


@dataclass
class Ztunnel:
    """A scripted peer on a plain socket."""

    path: Path
    socket: socket.socket = field(init=False)

    async def dial(self, hello: bytes = encode(Hello(1))) -> Ztunnel:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.socket.connect(str(self.path))
        self.socket.send(hello)
        return self

    async def receive(self) -> messages.Request | None:
        """The next request, None at the end. A descriptor that rides along must be there for adds alone."""
        got, inode = await self.receive_with_inode()
        assert (inode is not None) == isinstance(got, Add)
        return got

    async def receive_with_inode(self) -> tuple[messages.Request | None, int | None]:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self.socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self.socket)
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 2048, 4)
        except ConnectionResetError:
            return None, None
        inodes = [os.fstat(fd).st_ino for fd in fds]
        for fd in fds:
            os.close(fd)
        assert len(fds) < 2
        return messages.decode_request(data) if data else None, inodes[0] if inodes else None

    def ack(self, error: str = "") -> None:
        self.socket.send(encode(Ack(error)))

    async def take(self) -> messages.Request | None:
        got = await self.receive()
        if got is not None:
            self.ack()
        return got

    async def snapshot(self) -> list[messages.Request]:
        """Acknowledges everything up to SnapshotSent; what was named."""
        named: list[messages.Request] = []
        while (got := await self.take()) != SnapshotSent():
            assert got is not None, "dropped in the snapshot"
            named.append(got)
        return named

    async def end(self) -> None:
        assert await self.receive() is None


class Bench:
    """A running server and what it has told."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.changed: list[str | None] = []
        self._progress = asyncio.Event()
        self.acting: asyncio.Event | None = None  # until it is set, what follows from an acknowledgement is not done
        self.server = ZdsServer(str(folder / "zds.sock"), seconds)
        self.files: dict[str, Any] = {}

    def arrived(self, process: Process) -> None:
        process.close()

    def left(self, pid: int) -> None:
        self._note(None)

    async def acknowledged(self, uid: str) -> None:
        self._note(uid)
        if self.acting is not None:
            await self.acting.wait()

    def _note(self, uid: str | None) -> None:
        self.changed.append(uid)
        self._progress.set()

    def target(self, name: str) -> Any:
        """A file stands for the pod's namespace: its inode tells whether it is that one."""
        if name not in self.files:
            self.files[name] = (self.folder / name).open("w")
        return SimpleNamespace(netns=SimpleNamespace(fd=self.files[name].fileno()))

    def publish(self, name: str, **facts: Any) -> asyncio.Task[None]:
        self.targets = getattr(self, "targets", {})
        target = self.targets.setdefault(name, self.target(name))
        return asyncio.create_task(self.server.publish(pod(name, **facts), target))

    async def ztunnel(self) -> Ztunnel:
        return await Ztunnel(self.folder / "zds.sock").dial()

    async def synced(self) -> Ztunnel:
        """A ztunnel that has everything and is the newest."""
        made = await self.ztunnel()
        await made.snapshot()
        return made

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._progress.clear()
            await self._progress.wait()


def bench(seconds: float = LATE) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[Path], None]]:
    def decorate(steps: Callable[[Bench], Awaitable[None]]) -> Callable[[Path], None]:
        @wraps(steps)
        def run(tmp_path: Path) -> None:
            async def inside() -> None:
                async with asyncio.timeout(20), serving(Bench(tmp_path, seconds)) as made:
                    await steps(made)

            asyncio.run(inside())

        del run.__wrapped__  # type: ignore[attr-defined]  # or pytest would ask for the steps' argument
        return run

    return decorate


@contextlib.asynccontextmanager
async def serving(made: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(made.server.serve(made))
    await asyncio.sleep(0)
    try:
        yield made
        assert not task.done(), "the server has ended"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for file in made.files.values():
            file.close()


async def offered(made: Bench, *names: str) -> None:
    """Offers that no ztunnel has taken."""
    for name in names:
        with pytest.raises(ZtunnelError, match="no ztunnel is connected"):
            await made.publish(name)
