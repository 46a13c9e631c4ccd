# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets: their mode, and that they come back when somebody removes them."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from agent.core.errors import SluiceError
from agent.kernel import accepting, unix_socket


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accepting, "_LOOK", 0.02)
    return tmp_path / "z.sock"


async def connected(path: Path) -> bytes:
    """What the server says, once there is one."""
    async with asyncio.timeout(10):
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(0.01)
                continue
            said = await reader.read()
            writer.close()
            return said


async def greet(sock: socket.socket) -> None:
    with sock:
        await asyncio.get_running_loop().sock_sendall(sock, b"hello")


def during(path: Path, play: object) -> None:
    async def run() -> None:
        server = asyncio.create_task(accepting.serve(str(path), socket.SOCK_STREAM, greet))
        try:
            await play()  # type: ignore[operator]
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)

    asyncio.run(run())


def test_only_its_owner_may_use_it(path: Path) -> None:
    async def play() -> None:
        assert await connected(path) == b"hello"
        assert path.stat().st_mode & 0o777 == 0o600

    during(path, play)


def test_a_file_that_was_removed_is_made_again(path: Path) -> None:
    """As Go's UnixListener removes it, whoever's it is by then."""

    async def play() -> None:
        for _ in range(3):
            assert await connected(path) == b"hello"
            path.unlink()
        assert await connected(path) == b"hello"

    during(path, play)


def test_another_socket_under_that_name_is_left_to_whoever_made_it(path: Path) -> None:
    async def play() -> None:
        assert await connected(path) == b"hello"
        path.unlink()
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(str(path))
            inode = path.stat().st_ino
            await asyncio.sleep(0.1)
            assert path.stat().st_ino == inode

    during(path, play)


def test_a_run_directory_that_cannot_be_written_is_one_line_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SluiceError, match=f"run_dir {tmp_path}/file/run: Not a directory; it must"):
        unix_socket.claim(tmp_path / "file/run")
