# SPDX-License-Identifier: Apache-2.0
"""The plugin's socket with callers that behave in every way; after each, no descriptor is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent.sources.cni import socket as cni_socket
from agent.sources.cni import wire
from agent.sources.cni.socket import CniSocket
from agent.sources.cni.wire import CniReply, CniRequest, frame

STATUS = frame(
    json.dumps({"verb": "STATUS", "container_id": "", "ifname": "", "netns": "", "args": "", "config": {}}).encode()
)


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
    return found


class Service:
    """Closes what it is handed, as the real one does; `answer` may be an error to raise."""

    def __init__(self) -> None:
        self.answer: CniReply | Exception = CniReply(11, "later", "why")
        self.got: list[tuple[CniRequest, int | None]] = []

    async def handle(self, request: CniRequest, descriptor: int | None) -> CniReply:
        inode = None
        if descriptor is not None:
            assert not os.get_inheritable(descriptor)
            inode = os.fstat(descriptor).st_ino
            os.close(descriptor)
        self.got.append((request, inode))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Bench:
    def __init__(self, folder: Path) -> None:
        self.path, self.service = folder / "cni.sock", Service()
        self.counted: list[tuple[str, int]] = []
        self.socket = CniSocket(str(self.path), self.service, lambda verb, code, _: self.counted.append((verb, code)))  # type: ignore[arg-type]

    def connect(self) -> socket.socket:
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        caller.setblocking(False)
        caller.connect(str(self.path))
        return caller

    async def answer(self, caller: socket.socket) -> dict[str, Any] | None:
        """The framed answer, after which the agent closes; None when it closed without one."""
        data = b""
        with contextlib.suppress(ConnectionResetError):  # how a unix socket ends when not all was read
            while chunk := await asyncio.get_running_loop().sock_recv(caller, 1 << 16):
                data += chunk
        caller.close()
        if not data:
            return None
        assert int.from_bytes(data[:4]) == len(data) - 4
        given: dict[str, Any] = json.loads(data[4:])
        return given

    async def ask(self, *parts: bytes, fds: tuple[int, ...] = (), end: bool = False) -> dict[str, Any] | None:
        caller = self.connect()
        with contextlib.suppress(BrokenPipeError):
            for number, part in enumerate(parts):
                socket.send_fds(caller, [part], fds if number == 0 else [])
                await asyncio.sleep(0)
        if end:
            caller.shutdown(socket.SHUT_WR)
        return await self.answer(caller)


def play(folder: Path, script: Callable[[Bench], Coroutine[Any, Any, None]]) -> Bench:
    async def run() -> Bench:
        bench = Bench(folder)
        task = asyncio.create_task(bench.socket.serve())
        await asyncio.sleep(0)
        before = open_files()
        async with asyncio.timeout(20):
            await script(bench)
            assert await bench.ask(STATUS) == {"code": 11, "msg": "later", "details": "why"}  # it still serves
        assert open_files() - before == set()
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return bench

    return asyncio.run(run())


def test_a_request_in_pieces_with_its_namespace(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        with (tmp_path / "netns").open("w") as netns:
            await bench.ask(*(STATUS[i : i + 1] for i in range(len(STATUS))), fds=(netns.fileno(),))
            ((request, inode),) = bench.service.got
            assert request.verb == "STATUS" and inode == os.fstat(netns.fileno()).st_ino

    bench = play(tmp_path, script)
    assert bench.counted == [("STATUS", 11)] * 2
    assert stat.S_IMODE(bench.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (frame(b"{"), "not JSON"),
        (frame(b"[]"), "not an object"),
        (frame(b""), "not JSON"),
        (frame(b"\xff"), "not JSON"),
        (frame(b'{"verb": "VERSION"}'), "verb: not one of"),
        (b"\xff\xff\xff\xff", "the request has 4294967295 bytes; at most"),
        ((wire.MAX_REQUEST + 1).to_bytes(4), "bytes; at most"),
        (b"GET / HTTP/1.1\r\n\r\n", "bytes; at most"),
        (STATUS[:-1], "ended early"),
        (STATUS[:3], "ended early"),
        (b"", "ended early"),
    ],
)
@pytest.mark.parametrize("descriptors", [0, 1])
def test_what_is_no_request_is_refused(tmp_path: Path, sent: bytes, words: str, descriptors: int) -> None:
    async def script(bench: Bench) -> None:
        with (tmp_path / "netns").open("w") as netns:
            reply = await bench.ask(sent, fds=(netns.fileno(),) * (descriptors if sent else 0), end=True)
        assert reply is not None and reply["code"] == wire.INVALID_CONFIG and words in reply["msg"]
        assert bench.service.got == []

    play(tmp_path, script)


@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_more_than_one_descriptor_is_refused_and_none_is_kept(tmp_path: Path, number: int) -> None:
    async def script(bench: Bench) -> None:
        with (tmp_path / "netns").open("w") as netns:
            reply = await bench.ask(STATUS, fds=(netns.fileno(),) * number)
        assert reply is not None and "descriptor" in reply["msg"]
        assert bench.service.got == []

    play(tmp_path, script)


def test_a_descriptor_with_each_of_two_pieces_is_refused(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        caller = bench.connect()
        with (tmp_path / "netns").open("w") as netns:
            for part in (STATUS[:5], STATUS[5:]):
                socket.send_fds(caller, [part], [netns.fileno()])
        reply = await bench.answer(caller)
        assert reply is not None and "more than one descriptor" in reply["msg"]

    play(tmp_path, script)


def test_a_slow_caller_is_bounded_and_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(bench: Bench) -> None:
        monkeypatch.setattr(cni_socket, "SECONDS", 60)
        patient = bench.connect()
        patient.send(STATUS[:10])
        await asyncio.sleep(0)
        assert (await bench.ask(STATUS) or {})["code"] == 11  # meanwhile
        monkeypatch.setattr(cni_socket, "SECONDS", 0.05)
        slow = bench.connect()
        with (tmp_path / "netns").open("w") as netns:
            socket.send_fds(slow, [STATUS[:10]], [netns.fileno()])
        reply = await bench.answer(slow)
        assert reply is not None and reply["code"] == wire.TRY_AGAIN_LATER
        monkeypatch.setattr(cni_socket, "SECONDS", 60)
        patient.send(STATUS[10:])
        assert (await bench.answer(patient) or {})["code"] == 11

    play(tmp_path, script)


def test_a_caller_that_does_not_wait_for_its_answer(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        caller = bench.connect()
        caller.send(STATUS)
        caller.close()

    play(tmp_path, script)


def test_a_defect_is_an_answer_and_not_the_end_of_the_agent(tmp_path: Path) -> None:
    async def script(bench: Bench) -> None:
        later = bench.service.answer
        bench.service.answer = ZeroDivisionError("a defect")
        assert (await bench.ask(STATUS) or {})["code"] == wire.TRY_AGAIN_LATER
        bench.service.answer = later

    play(tmp_path, script)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(bench: Bench) -> None:
        monkeypatch.setattr(cni_socket, "peer", lambda sock: (1, 1000))
        assert "only root" in (await bench.ask(STATUS) or {})["msg"]
        assert bench.service.got == []
        monkeypatch.setattr(cni_socket, "peer", lambda sock: (1, 0))

    play(tmp_path, script)


def test_without_a_descriptor_left_for_the_namespace_the_runtime_is_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel then delivers the request without what came along (scm_detach_fds)."""

    async def script(bench: Bench) -> None:
        receive = socket.recv_fds
        with monkeypatch.context() as patch, (tmp_path / "netns").open("w") as netns:

            def without(sock: socket.socket, *sizes: int) -> Any:
                data, descriptors, flags, address = receive(sock, *sizes)
                for one in descriptors:
                    os.close(one)
                return data, [], flags | socket.MSG_CTRUNC, address

            patch.setattr("agent.sources.cni.socket.socket.recv_fds", without)
            answer = await bench.ask(STATUS, fds=(netns.fileno(),))
        assert answer is not None and (answer["code"], "no descriptor left" in answer["msg"]) == (11, True)

    play(tmp_path, script)
